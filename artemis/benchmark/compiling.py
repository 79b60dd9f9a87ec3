"""Whole models under `torch.compile`: several of them in one process, measured in turns."""

from contextlib import AbstractContextManager

import torch
from torch import nn

#: Seeds of dropout masks are drawn as without the compiler, so that the gate can compare.
_OPTIONS = {"fallback_random": True}
#: Graphs in one process: torch counts those of all models together, since they share `__call__`.
_GRAPHS = 64


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
