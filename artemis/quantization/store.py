"""A quantized base on disk: one safetensors file whose header says everything. No pickle.

    quantized_base.safetensors   the packed weights and every other tensor of the base, each once;
                                 in the header's metadata, under "quantized_base", one JSON object:
                                 format, library version, the model's class and its configurations
                                 (of generation, too), how each layer is packed (the report), which
                                 names stand for the same tensor, and which layers packing untied
                                 from another

Adapters are saved apart, as always: `model.save_adapter_parameters`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PretrainedConfig

from ..errors import AdapterError, listed
from ..layers.bank import BANK
from ..layers.packed import packed_modules, parts_of, sample_of
from ..merging import check_unmerged
from ..saving.atomic import replace_files
from ..saving.header import damage_named, read_header
from ..version import __version__
from ..wrappers import unwrapped
from .report import QuantizationReport

FILE = "quantized_base.safetensors"
FORMAT_VERSION = 1
_METADATA_KEY = "quantized_base"


@dataclass(frozen=True)
class StoredBase:
    """What a file holds, without its tensors' values."""

    path: Path
    library_version: str
    class_name: str
    #: Of a transformers model, its configuration as plain values; else None.
    config: Mapping[str, Any] | None
    #: Of a model that generates, how (end of text, sampling) as plain values; else None.
    generation: Mapping[str, Any] | None
    report: QuantizationReport
    #: Another name of a tensor -> the name that it is stored under.
    aliases: Mapping[str, str]
    #: Paths of packed layers whose weight was another module's too (`Packing.untied`).
    untied: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]


def save_quantized(model: nn.Module, path: str | os.PathLike) -> None:
    """Save the quantized base of `model`, without its adapter, into the directory `path`.

    Of a wrapper (of `torch.compile`, for several devices) the model within is saved. Killed at any
    moment, it leaves the old file or the new one; other files are not touched.

    Raises `AdapterError` where the model is not quantized or holds a merged adapter, packed layers
    are not where they were packed, or `path` is a file; `OSError` where it cannot be written.
    """
    model = unwrapped(model)
    report = getattr(model, "quantization_report", None)
    if report is None or not any(packed_modules(model)):
        raise AdapterError(f"{type(model).__name__} is not quantized; quantize_adapter_model does")
    check_unmerged(model)
    _check_places(model, report)
    directory = Path(path)
    tensors, aliases = _tensors(model)
    header = json.dumps(
        {
            "format_version": FORMAT_VERSION,
            "library_version": __version__,
            "class_name": type(model).__name__,
            "config": _plain(getattr(model, "config", None)),
            "generation_config": _plain(getattr(model, "generation_config", None)),
            "report": report.to_dict(),
            "aliases": aliases,
            "untied": [path for path, module in packed_modules(model) if module.packing.untied],
        }
    )
    replace_files(directory, {FILE: lambda file: save_file(tensors, file, {_METADATA_KEY: header})})


def holds_base(path: str | os.PathLike) -> bool:
    """Whether `path` is a quantized base, or a directory that one was saved in."""
    path = Path(path)
    return (path / FILE).is_file() or path.is_file() and path.name == FILE


def _check_places(model: nn.Module, report: QuantizationReport) -> None:
    """Refuse a model whose packed layers bear other names than in the report: none could load."""
    now = {f"{path}.{name}" for path, m in packed_modules(model) for name in m.packed_shapes()}
    moved = now ^ {entry.parameter for entry in report.layers}
    if moved:
        paths = (name.removesuffix(".weight") for name in sorted(moved))
        raise AdapterError(
            f"{listed(paths)}: wrapped, moved or replaced since the model was quantized;"
            " allowed: layers in the place where they were packed"
        )


def _tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every tensor of the base under its first name, and the other names of each."""
    names: dict[int, str] = {}
    tensors, aliases = {}, {}
    storages = set()
    for name, tensor in named_tensors(model):
        if id(tensor) in names:
            aliases[name] = names[id(tensor)]
            continue
        names[id(tensor)] = name
        storage = tensor.untyped_storage().data_ptr()
        shares = storage in storages  # views of one storage: safetensors takes none
        storages.add(storage)
        tensors[name] = tensor.detach().clone() if shares else tensor.detach().contiguous()
    return tensors, aliases


def named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers of the base, those that `state_dict` leaves out included."""
    both = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return [(name, tensor) for name, tensor in both if not name.startswith(f"{BANK}.")]


def is_meta(model: nn.Module) -> bool:
    """Whether a tensor of the base is on the meta device, without values."""
    return any(tensor.is_meta for _, tensor in named_tensors(model))


def read_stored(path: str | os.PathLike) -> StoredBase:
    """The header of the file at `path`, or in it; errors as `load_quantized`'s."""
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no quantized base at {path}")
    header, tensors = read_header(path, _METADATA_KEY, FORMAT_VERSION, "a quantized base's")
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    with damage_named(path):
        report = QuantizationReport.from_dict(header["report"])
        stored = StoredBase(
            path, header["library_version"], header["class_name"], header.get("config"),
            header.get("generation_config"), report, header["aliases"],
            tuple(header.get("untied", ())), shapes,
        )  # fmt: skip
    needed = {part for entry in report.layers for part in _always(entry.parameter)}
    missing = sorted((needed | set(stored.aliases.values())) - shapes.keys())
    if missing:
        raise AdapterError(f"{path}: damaged, it lacks {listed(missing)}")
    return stored


def _always(name: str) -> tuple[str, str, str]:
    """The tensors that any packed parameter has."""
    data, scale, _ = parts_of(name)
    return data, scale, sample_of(name)


def _plain(config: object) -> dict[str, Any] | None:
    known = isinstance(config, (PretrainedConfig, GenerationConfig))
    return json.loads(config.to_json_string(use_diff=False)) if known else None
