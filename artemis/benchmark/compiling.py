"""Whole models under `torch.compile`: several of them in one process, measured in turns."""

import importlib.util
import shutil
from contextlib import AbstractContextManager

import torch
from torch import nn

from ..errors import AdapterError
from ..training import default_device

#: Seeds of dropout masks are drawn as without the compiler, so that the gate can compare.
_OPTIONS = {"fallback_random": True}
#: Graphs in one process: torch counts those of all models together, since they share `__call__`.
_GRAPHS = 64


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


def compile_model(model: nn.Module) -> None:
    """Compile a model in place, for the very shapes that it is called with; it keeps its names.

    Its calls raise where it cannot be compiled whole, or torch would no longer compile it.
    """
    model.compile(fullgraph=True, dynamic=False, options=_OPTIONS)


def make_room_for_graphs() -> None:
    """Let this process compile the models of many arms; torch's default would stop at eight."""
    torch.compiler.config.recompile_limit = _GRAPHS


def nothing_compiled() -> AbstractContextManager:
    """Inside, a call that would have to compile raises."""
    return torch.compiler.set_stance("fail_on_recompile")
