"""Fusing a model's own operations, module by module, and undoing it."""

from collections import Counter
from functools import partial
from typing import Any

from torch import nn

from ..errors import AdapterError, listed
from ..layers.adapted import has_own_forward
from .attention import fuse_attention, unfuse_attention
from .forwards import FORWARDS
from .originals import GATE, NORM, ROTARY, examine
from .report import FusionReport, Left


def fuse_model(model: nn.Module) -> FusionReport:
    """Let `model` compute its norms, gated MLPs and rotary embeddings by `artemis_kernels`.

    In place: modules that compute what Llama's do, known by their code, get a forward of their
    own; tensors, names, classes and hooks stay. On a CPU, where attention is "sdpa", it becomes
    "artemis" too. Results change by rounding only. What is compiled or exported is transformers'
    own code. Modules that are fused already stay so.

    Raises `TypeError` where `model` is no module.
    """
    _check_module(model)
    fused: Counter[str] = Counter()
    left: Counter[tuple[str, str]] = Counter()
    for module in model.modules():
        examined = examine(module)
        if examined is None:
            continue
        kind, reason = examined
        if not is_fused(module):
            if reason is None and has_own_forward(module):
                reason = "it carries a forward of its own (as accelerate's hooks set it)"
            if reason is not None:
                left[type(module).__name__, reason] += 1
                continue
            # A partial pickles and follows a deepcopy to the copy; a method is found by its name.
            module.forward = partial(FORWARDS[kind], module)
        fused[kind] += 1
    return FusionReport(
        fused[NORM], fused[GATE], fused[ROTARY], fuse_attention(model),
        tuple(Left(name, count, reason) for (name, reason), count in left.items()),
    )  # fmt: skip


def unfuse_model(model: nn.Module) -> None:
    """Undo `fuse_model`: every module has its class's forward again.

    Raises `TypeError` where `model` is no module; `AdapterError`, before anything is changed, where
    something else has wrapped the forward of a fused module.
    """
    _check_module(model)
    check_unfusable(model)
    for module in model.modules():
        if is_fused(module):
            del module.forward
    unfuse_attention(model)


def check_unfusable(model: nn.Module) -> None:
    """Raise `AdapterError` where what stands round a fused forward would go on calling it."""
    held = [
        path
        for path, module in model.named_modules()
        if not is_fused(module) and any(map(_is_ours, vars(module).values()))
    ]
    if held:
        raise AdapterError(
            f"{listed(held)}: each was fused and carries another forward since (as accelerate's"
            " dispatch_model sets it), which would go on calling the fused one; take that off first"
            " (accelerate.hooks.remove_hook_from_submodules)"
        )


def is_fused(module: nn.Module) -> bool:
    """Whether this very module runs a fused forward."""
    return _is_ours(vars(module).get("forward"))


def _is_ours(value: Any) -> bool:
    return isinstance(value, partial) and value.func in FORWARDS.values()


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"got a {type(model).__name__}, allowed: a torch.nn.Module")
