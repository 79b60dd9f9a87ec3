"""Which modules compute what Llama's do: those whose code is the same.

Most families of transformers repeat Llama's norm, MLP and rotary function word for word, under
names of their own. So a module is known by the code of its forward, and no list of models is kept.
"""

import dis
import functools
import importlib
import inspect
from types import CodeType, FunctionType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn

from artemis_kernels import gated_activation, rms_norm, rotary_embedding

from .activations import activation_of, why_no_activation

NORM, GATE, ROTARY = "norm", "gate", "rotary"
#: The function by which attention turns q and k, in each model's file.
APPLY_ROTARY = "apply_rotary_pos_emb"

#: Model and name of what is known; Olmo 2's norm rounds once, Qwen 2's MLP has no variable.
_ORIGINALS = {
    NORM: (("llama", "LlamaRMSNorm"), ("olmo2", "Olmo2RMSNorm")),
    GATE: (("llama", "LlamaMLP"), ("qwen2", "Qwen2MLP")),
    ROTARY: (("llama", APPLY_ROTARY),),
}
_NAMES_AND_CONSTANTS = frozenset((*dis.hasname, *dis.hasconst))


def examine(module: nn.Module) -> tuple[str, str | None] | None:
    """The kind of `module` and why it cannot be fused, None where it can; None: of no kind."""
    forward = getattr(type(module), "forward", None)  # TorchScript's modules have none
    for kind in (NORM, GATE):
        if any(same_code(forward, original) for original in _originals(kind)):
            return kind, _why_not(kind, forward) or _why_no_gate(kind, module)
    if _names_rotary(inspect.unwrap(forward)):
        return ROTARY, _why_no_rotary(forward)
    if "RMSNorm" in type(module).__name__:
        return NORM, "its forward is other code than Llama's"
    if (hasattr(module, "gate_proj") and hasattr(module, "up_proj")) or hasattr(
        module, "gate_up_proj"
    ):
        return GATE, "its forward is other code than Llama's"
    return None


def same_code(function: object, original: object) -> bool:
    """Whether two functions compile to the same instructions over the same globals.

    Locals count by position, not by name; functions among the globals are compared likewise, since
    the same line means something else where `rotate_half` does (NanoChat).
    """
    if function is original:
        return True
    if not (isinstance(function, FunctionType) and isinstance(original, FunctionType)):
        return False
    return (
        _read(function.__code__) == _read(original.__code__)
        and function.__defaults__ == original.__defaults__
        and function.__kwdefaults__ == original.__kwdefaults__
        and all(
            same_code(function.__globals__.get(name), original.__globals__.get(name))
            for name in _read(original.__code__).globals
        )
    )


class _Code(NamedTuple):
    """What of a code object says what it does, and not how its text is written."""

    arguments: tuple[int, ...]
    instructions: tuple[tuple[int, object], ...]
    globals: frozenset[str]


@functools.cache
def _read(code: CodeType) -> _Code:
    variable = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    steps = tuple(dis.get_instructions(code))
    return _Code(
        (code.co_argcount, code.co_kwonlyargcount, variable),
        tuple((s.opcode, s.argval if s.opcode in _NAMES_AND_CONSTANTS else s.arg) for s in steps),
        frozenset(s.argval for s in steps if s.opname == "LOAD_GLOBAL"),
    )


def _names_rotary(function: object) -> bool:
    return isinstance(function, FunctionType) and APPLY_ROTARY in _read(function.__code__).globals


def _why_no_rotary(forward: FunctionType) -> str | None:
    if not _names_rotary(forward):
        return "its forward is decorated, so that its globals cannot be replaced"
    function = forward.__globals__.get(APPLY_ROTARY)
    if isinstance(function, nn.Module):
        return f"its {APPLY_ROTARY} is a module (as the package kernels makes it)"
    return _why_not(ROTARY, function)


def _why_no_gate(kind: str, module: nn.Module) -> str | None:
    if kind != GATE or activation_of(module.act_fn):
        return None
    return why_no_activation(module.act_fn)


def _why_not(kind: str, function: object) -> str | None:
    for original in _originals(kind):
        if same_code(function, original):
            if _means_ours(kind, original):
                return None
            return "Llama's own computes something else in this version of transformers"
    return f"its {APPLY_ROTARY} is other code than Llama's"


@functools.cache
def _originals(kind: str) -> tuple[object, ...]:
    """transformers' own functions of a kind, where no other library has put its own in their place.

    Imported late: each comes with its whole model.
    """
    found = []
    for model, name in _ORIGINALS[kind]:
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        value = getattr(module, name)
        if value.__module__ == module.__name__:
            found.append(value.forward if inspect.isclass(value) else value)
    return tuple(found)


@functools.cache
def _means_ours(kind: str, original: FunctionType) -> bool:
    """Whether a function of transformers computes what our operation means, on a few numbers.

    The code of a later version may be another, and that of all its copies with it.
    """
    try:
        return _CHECKS[kind](original)
    except (AttributeError, TypeError):  # it reads other attributes, or takes other arguments
        return False


def _norm_agrees(forward: FunctionType) -> bool:
    x, weight = _numbers(3, 6), _numbers(6) + 2
    y = forward(SimpleNamespace(weight=weight, variance_epsilon=0.1), x)
    return _close(y, rms_norm(x, weight, 0.1, impl="reference"))


def _gate_agrees(forward: FunctionType) -> bool:
    x = _numbers(3, 6)
    parts = dict(gate_proj=lambda x: 2 * x, up_proj=lambda x: x + 1, down_proj=lambda x: 3 * x)
    y = forward(SimpleNamespace(act_fn=nn.functional.silu, **parts), x)
    return _close(y, 3 * gated_activation(2 * x, x + 1, "silu", impl="reference"))


def _rotary_agrees(function: FunctionType) -> bool:
    q, k, cos, sin = (
        _numbers(2, 3, 5, 4),
        _numbers(2, 1, 5, 4),
        _numbers(2, 5, 4),
        _numbers(2, 5, 4) + 1,
    )
    found, wanted = function(q, k, cos, sin), rotary_embedding(q, k, cos, sin, impl="reference")
    return all(map(_close, found, wanted))


_CHECKS = {NORM: _norm_agrees, GATE: _gate_agrees, ROTARY: _rotary_agrees}


def _numbers(*shape: int) -> torch.Tensor:
    """Numbers in no order, without torch's generator, whose state is the user's."""
    count = torch.Size(shape).numel()
    steps = torch.arange(1, count + 1, dtype=torch.float32, device="cpu")
    return (steps * steps).sin().reshape(shape)


def _close(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.shape == y.shape and torch.allclose(x, y, rtol=1e-5, atol=1e-6)
