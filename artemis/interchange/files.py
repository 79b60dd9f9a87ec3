"""PEFT's two files of a LoRA adapter: names, reading, writing.

adapter_config.json             settings; a pattern in it is a regular expression for paths
adapter_model.safetensors       A (rank, in) and B (out, rank) of every module, and whole heads
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import AdapterError, listed
from ..saving.adapter_file import PARAMETERS_FILE
from ..saving.atomic import replace_files

SETTINGS_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
_PICKLED_FILE = "adapter_model.bin"
_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<path>.+)\.lora_(?P<matrix>[AB])\.weight")


@dataclass(frozen=True)
class LoRAFiles:
    """What a folder holds: its settings, path -> (A, B), and the names and tensors of heads."""

    path: Path
    settings: Mapping[str, Any]
    lora: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    others: Mapping[str, torch.Tensor]


def holds_lora(path: str | os.PathLike) -> bool:
    """Whether `path` is a folder of PEFT's, and not of an adapter of ours as well."""
    folder = Path(path)
    return (folder / SETTINGS_FILE).is_file() and not (folder / PARAMETERS_FILE).is_file()


def read_files(path: str | os.PathLike) -> LoRAFiles:
    """Read the folder `path`, on the CPU.

    Raises `FileNotFoundError` where a file is missing, `AdapterError` where one is damaged, is
    another method's than LoRA's, or holds half of a pair.
    """
    folder = Path(path)
    settings = _read_settings(folder / SETTINGS_FILE)
    tensors = _read_tensors(folder)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    others = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(_PREFIX)
        found = _LORA.fullmatch(name)
        if found:
            pairs.setdefault(found["path"], {})[found["matrix"]] = tensor
        else:
            others[name] = tensor
    if not pairs:
        raise AdapterError(f"{folder / TENSORS_FILE}: holds no lora_A.weight or lora_B.weight")
    halves = [module for module, pair in pairs.items() if len(pair) < 2]
    if halves:
        raise AdapterError(f"{folder / TENSORS_FILE}: holds only A or only B of {listed(halves)}")
    lora = {module: (pair["A"], pair["B"]) for module, pair in pairs.items()}
    for module, (a, b) in lora.items():
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise AdapterError(
                f"{folder / TENSORS_FILE}: A of {module} is {tuple(a.shape)} and B"
                f" {tuple(b.shape)}, allowed: (rank, in) and (out, rank)"
            )
    return LoRAFiles(folder, settings, lora, others)


def write_files(
    folder: Path,
    settings: Mapping[str, Any],
    lora: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    heads: Mapping[str, torch.Tensor],
) -> None:
    """Write both files; whenever the process dies, the old adapter or the new one is complete."""
    tensors = {f"{_PREFIX}{name}": tensor for name, tensor in heads.items()}
    for module, (a, b) in lora.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b
    # Cloned: A may be one tensor for many modules, which the format does not allow.
    tensors = {
        name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()
    }
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    replace_files(
        folder,
        {
            SETTINGS_FILE: lambda path: path.write_text(text, encoding="utf-8"),
            TENSORS_FILE: lambda path: save_file(tensors, path, {"format": "pt"}),
        },
    )


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no PEFT adapter at {path.parent} (looked for {path})")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path}: damaged ({error})") from None
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "LORA":
        raise AdapterError(f"{path}: peft_type: got {kind!r}, allowed: 'LORA'")
    return settings


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / TENSORS_FILE
    if not path.is_file():
        pickled = folder / _PICKLED_FILE
        why = f"; {pickled} is pickled, which can run code: have PEFT save it anew"
        raise FileNotFoundError(
            f"no PEFT adapter at {folder} (looked for {path}){why if pickled.exists() else ''}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterError(f"{path}: damaged, or no safetensors file ({error})") from None
