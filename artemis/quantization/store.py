"""A quantized base on disk: one safetensors file whose header says everything. No pickle.

    quantized_base.safetensors   the packed weights and every other tensor of the base, each once;
                                 in the header's metadata, under "quantized_base", one JSON object:
                                 format, library version, the model's class and configuration, how
                                 each layer is packed (the report), which names stand for the same
                                 tensor, and which layers packing untied from another

Adapters are saved apart, as always: `model.save_adapter_parameters`.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PretrainedConfig

from artemis_kernels import QuantizedWeight

from ..architectures import output_head
from ..atomic import replace_files
from ..bank import BANK, find_bank
from ..errors import AdapterError, listed
from ..layers import weight_of
from ..merging import check_unmerged
from ..quantized_layers import PARTS, QUANTIZED, SAMPLE, pack, packed_layers
from ..version import __version__
from .report import LayerReport, QuantizationReport

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
    report: QuantizationReport
    #: Another name of a tensor -> the name that it is stored under.
    aliases: Mapping[str, str]
    #: Paths of packed layers whose weight was another module's too (`Packing.untied`).
    untied: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]


def save_quantized(model: nn.Module, path: str | os.PathLike) -> None:
    """Save the quantized base of `model`, without its adapter, into the directory `path`.

    Killed at any moment, it leaves the old file or the new one; other files are not touched.

    Raises `AdapterError` where the model is not quantized or holds a merged adapter, or `path` is a
    file.
    """
    report = getattr(model, "quantization_report", None)
    if report is None or not any(packed_layers(model)):
        raise AdapterError(f"{type(model).__name__} is not quantized; quantize_adapter_model does")
    check_unmerged(model)
    directory = Path(path)
    if directory.exists() and not directory.is_dir():
        raise AdapterError(f"{directory}: got a file, allowed: a directory to save the base in")
    tensors, aliases = _tensors(model)
    header = json.dumps(
        {
            "format_version": FORMAT_VERSION,
            "library_version": __version__,
            "class_name": type(model).__name__,
            "config": _plain(getattr(model, "config", None)),
            "report": report.to_dict(),
            "aliases": aliases,
            "untied": [path for path, module in packed_layers(model) if module.packing.untied],
        }
    )
    directory.mkdir(parents=True, exist_ok=True)
    replace_files(directory, {FILE: lambda file: save_file(tensors, file, {_METADATA_KEY: header})})


def load_quantized(
    model_or_config: nn.Module | PretrainedConfig, path: str | os.PathLike
) -> nn.Module:
    """Return the model that `save_quantized` saved in `path`.

    Args:
        model_or_config: a model of the saved one's class and sizes, neither quantized nor adapted,
            whose tensors are replaced in place (on its device; one on the meta device lands on
            the CPU); or its configuration, from which transformers' class of the saved name is
            built without ever holding the full weights.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterError: a damaged or foreign file, or another model than the saved one.

    After these, and after an interruption, the model is as it was.
    """
    stored = read_stored(path)
    model = model_or_config
    if isinstance(model, PretrainedConfig):
        model = _empty(model, stored)
    layers = _check(model, stored)
    with safe_open(stored.path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with _all_or_nothing(model):
        _put(model, stored, layers, tensors)
        model.quantization_report = stored.report
    return model


def holds_base(path: str | os.PathLike) -> bool:
    """Whether `path` is a quantized base, or a directory that one was saved in."""
    path = Path(path)
    return (path / FILE).is_file() or path.is_file() and path.name == FILE


def _tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every tensor of the base under its first name, and the other names of each."""
    names: dict[int, str] = {}
    tensors, aliases = {}, {}
    storages = set()
    for name, tensor in _named(model):
        if id(tensor) in names:
            aliases[name] = names[id(tensor)]
            continue
        names[id(tensor)] = name
        storage = tensor.untyped_storage().data_ptr()
        shares = storage in storages  # views of one storage: safetensors takes none
        storages.add(storage)
        tensors[name] = tensor.detach().clone() if shares else tensor.detach().contiguous()
    return tensors, aliases


def _named(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers of the base, those that `state_dict` leaves out included."""
    both = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return [(name, tensor) for name, tensor in both if not name.startswith(f"{BANK}.")]


def read_stored(path: str | os.PathLike) -> StoredBase:
    """The header of the file at `path`, or in it; errors as `load_quantized`'s."""
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no quantized base at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterError(f"{path}: damaged, or no safetensors file ({error})") from None
    if _METADATA_KEY not in metadata:
        raise AdapterError(f"{path}: a safetensors file, but not a quantized base's")
    try:
        header = json.loads(metadata[_METADATA_KEY])
        version = header["format_version"]
        if version != FORMAT_VERSION:
            raise AdapterError(f"{path}: got format version {version!r}, allowed: {FORMAT_VERSION}")
        report = QuantizationReport.from_dict(header["report"])
        stored = StoredBase(
            path, header["library_version"], header["class_name"], header.get("config"), report,
            header["aliases"], tuple(header.get("untied", ())), shapes,
        )  # fmt: skip
    except AdapterError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{path}: its header is damaged ({error!r})") from None
    needed = {f"{entry.path}.{part}" for entry in report.layers for part in (*PARTS[:2], SAMPLE)}
    missing = sorted((needed | set(stored.aliases.values())) - shapes.keys())
    if missing:
        raise AdapterError(f"{path}: damaged, it lacks {listed(missing)}")
    return stored


def _empty(config: PretrainedConfig, stored: StoredBase) -> nn.Module:
    """A model of the saved class on the meta device."""
    cls = getattr(transformers, stored.class_name, None)
    if cls is None:
        raise AdapterError(
            f"{stored.path}: transformers has no class {stored.class_name}; give the model itself"
        )
    with torch.device("meta"):
        model = cls(config).eval()
    for module in model.modules():
        lost = [n for n, v in vars(module).items() if isinstance(v, torch.Tensor) and v.is_meta]
        if lost:  # neither parameters nor buffers, so no file holds them
            raise AdapterError(
                f"{stored.class_name} keeps tensors that are not saved ({listed(lost)}); give the"
                " model itself"
            )
    return model


def _check(model: nn.Module, stored: StoredBase) -> dict[str, nn.Module]:
    """The layers to pack by path; `AdapterError` where the file is not this model's."""
    name = type(model).__name__
    if find_bank(model) is not None or any(packed_layers(model)):
        raise AdapterError(
            f"{name} is adapted or quantized already, allowed: a plain model; load the adapter"
            " after the base"
        )
    problems = []
    if name != stored.class_name:
        problems.append(f"the model is a {name}, the file's a {stored.class_name}")
    modules, layers = dict(model.named_modules()), {}
    for layer in stored.report.layers:
        module = modules.get(layer.path)
        shape = tuple(weight_of(module).shape) if type(module) in QUANTIZED else None
        if shape == (layer.out_features, layer.in_features):
            layers[layer.path] = module
        else:
            what = type(module).__name__ if shape is None else f"{shape[0]}x{shape[1]}"
            wanted = f"{layer.out_features}x{layer.in_features}"
            problems.append(f"{layer.path} is {what}, in the file a linear layer of {wanted}")
    if not problems:
        problems = _differences(model, stored, layers)
    if problems:
        raise AdapterError(f"{stored.path} does not fit the model: {listed(problems)}")
    return layers


def _differences(
    model: nn.Module, stored: StoredBase, layers: Mapping[str, nn.Module]
) -> list[str]:
    """Tensors that only one side has, or in another shape; packed layers are compared already."""
    paths = {id(module): path for path, module in layers.items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    parts = {f"{path}.{part}" for path in layers for part in (*PARTS, SAMPLE)}
    # A layer may have several names: each -> the one that it is stored under.
    my_names = {name: paths[id(m)] for name, m in modules.items() if id(m) in paths}
    their_names = {path: path for path in layers} | {
        _owner(name): _owner(first) for name, first in stored.aliases.items() if first in parts
    }
    weights = {f"{name}.weight" for name in my_names}
    mine = {name: tuple(t.shape) for name, t in _named(model) if name not in weights}
    theirs = {name: shape for name, shape in stored.shapes.items() if name not in parts}
    theirs |= {
        name: stored.shapes.get(first)
        for name, first in stored.aliases.items()
        if first not in parts
    }
    # Buffers outside the state may differ between versions; a model with values has its own.
    optional = set() if _is_meta(model) else mine.keys() - model.state_dict().keys()
    names = sorted((mine.keys() | theirs.keys()) - optional)
    return [
        f"{name} is {_named_layer(my_names, name)}, in the file {_named_layer(their_names, name)}"
        for name in sorted(my_names.keys() | their_names.keys())
        if my_names.get(name) != their_names.get(name)
    ] + [
        f"{name} is {mine.get(name, 'missing')}, in the file {theirs.get(name, 'missing')}"
        for name in names
        if mine.get(name) != theirs.get(name)
    ]


def _named_layer(names: Mapping[str, str], name: str) -> str:
    return f"another name of {names[name]}" if name in names else "none of a packed layer"


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Every module gets its class and attributes back where the body does not end."""
    kept = [(module, module.__class__, _attributes(module)) for module in model.modules()]

    def restore() -> None:
        for module, cls, attributes in kept:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)

    with ExitStack() as undo:
        undo.callback(restore)
        yield
        undo.pop_all()


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes, the tables of tensors among them copied, since those are changed in place."""
    tables = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    return {**vars(module), **{name: vars(module)[name].copy() for name in tables}}


def _plain(config: object) -> dict[str, Any] | None:
    known = isinstance(config, PretrainedConfig)
    return json.loads(config.to_json_string(use_diff=False)) if known else None


def _is_meta(model: nn.Module) -> bool:
    return any(tensor.is_meta for _, tensor in _named(model))


def _put(
    model: nn.Module,
    stored: StoredBase,
    layers: Mapping[str, nn.Module],
    tensors: dict[str, torch.Tensor],
) -> None:
    """Replace the model's tensors by the file's, which were compared with it."""
    device = torch.device("cpu") if _is_meta(model) else next(model.parameters()).device
    weights = {entry.path: _weight(stored, entry, tensors) for entry in stored.report.layers}
    head = output_head(model)
    for path, weight in weights.items():
        module = layers[path]
        weight = replace(weight, makes_logits=module is head)
        taken = tensors.pop(f"{path}.{SAMPLE}")
        pack(
            module, QUANTIZED[type(module)], weight.to(device), taken.to(device),
            untied=path in stored.untied,
        )  # fmt: skip
    placed = {name: tensor.to(device) for name, tensor in tensors.items()}
    known = dict(_named(model))
    made = {
        name: nn.Parameter(tensor, known[name].requires_grad)
        if isinstance(known[name], nn.Parameter)
        else tensor
        for name, tensor in placed.items()
        if name in known
    }
    for name in known:
        tensor = made.get(stored.aliases.get(name, name))
        if tensor is not None:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, tensor)


def _weight(
    stored: StoredBase, entry: LayerReport, tensors: dict[str, torch.Tensor]
) -> QuantizedWeight:
    data, scale, offset = (tensors.pop(f"{entry.path}.{part}", None) for part in PARTS)
    if entry.format == "fp8":
        if data.dtype != torch.uint8:
            raise AdapterError(
                f"{stored.path}: {entry.path} is damaged: its numbers are {data.dtype}, allowed:"
                " torch.uint8"
            )
        data = data.view(torch.float8_e4m3fn)
    form = (entry.format, entry.group_size, stored.report.activation_bits)
    try:
        weight = QuantizedWeight(data, scale, offset, *form)
    except ValueError as error:
        raise AdapterError(f"{stored.path}: {entry.path} is damaged ({error})") from None
    if weight.shape != (entry.out_features, entry.in_features):
        raise AdapterError(f"{stored.path}: {entry.path} is damaged: got {tuple(weight.shape)}")
    return weight
