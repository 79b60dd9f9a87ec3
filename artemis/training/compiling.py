"""Whether `torch.compile` has what it needs."""

import importlib.util
import shutil

import torch

from ..errors import AdapterError
from .loading import default_device


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` finds what it generates code for: Triton, or a C++ compiler."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return any(map(shutil.which, ("g++", "clang++")))


def require_compiler(setting: str) -> None:
    """Raise AdapterError for a setting that asks for `torch.compile` where it finds nothing."""
    device = default_device()
    if not can_compile(device):
        missing = "Triton" if device.type == "cuda" else "a C++ compiler (g++ or clang++)"
        raise AdapterError(f"{setting}: torch.compile needs {missing}, and there is none")
