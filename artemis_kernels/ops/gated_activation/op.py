"""`gated_activation`: checks, choice of path, the torch operators."""

import torch

from ...core import call, checks
from ...core.registration import Operation, define, differentiate, once
from ...core.types import Choice, Cost
from .. import passes
from . import eager, reference

NAME = "gated_activation"
_FLOPS = 10  # of an element, an exponential counted as five


def gated_activation(
    gate: torch.Tensor, up: torch.Tensor, activation: str = "silu", *, impl: str | None = None
) -> torch.Tensor:
    """Return `act(gate) · up` (Shazeer, arXiv 2002.05202, §2): SwiGLU with "silu".

    Computed in fp32 and rounded once; torch rounds act(gate) too.

    Args:
        gate: any shape, floating.
        up: of the same shape and dtype.
        activation: "silu", "gelu", "gelu_tanh", "relu" or "identity".
        impl: None for the best that applies, or "triton", "eager", "reference".

    Returns:
        A tensor of their shape and dtype. Gradients flow to both.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, naming it.
        Unavailable: a path asked for by `impl` that cannot run, saying why.
    """
    path = plan(gate, up, activation, impl=impl)
    with call.outside_autocast(gate):
        if path.impl == "reference":
            return reference.gated_activation(gate, up, activation)
        return _operator(gate, up, activation, path.impl)


def plan(gate, up, activation="silu", *, impl=None) -> call.Path:
    """Check the arguments of `gated_activation` and choose its path; runs nothing."""
    for name, value in (("gate", gate), ("up", up)):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise TypeError(f"{NAME}: {name} must be a floating-point tensor, got {kind}")
    if up.shape != gate.shape:
        shapes = tuple(gate.shape), tuple(up.shape)
        raise ValueError(f"{NAME}: up must have gate's shape {shapes[0]}, got {shapes[1]}")
    if up.dtype != gate.dtype:
        raise TypeError(f"{NAME}: up is {up.dtype}, but gate is {gate.dtype}")
    if up.device != gate.device:
        raise ValueError(f"{NAME}: up is on {up.device}, but gate is on {gate.device}")
    checks.options(NAME, 0.0, impl, activation)
    return passes.chosen(NAME, impl, gate)


def explain(gate, up, activation="silu", *, impl=None) -> Choice:
    """The path `gated_activation` takes for these arguments, why, and what it costs."""
    path = passes.told(plan(gate, up, activation, impl=impl), gate)
    return Choice(NAME, *path, cost(gate.numel(), gate.dtype.itemsize))


def cost(elements: int, itemsize: int) -> Cost:
    """Forward: gate and up read and y written once."""
    return Cost(flops=_FLOPS * elements, bytes=3 * itemsize * elements)


def _path(impl: str):
    if impl == "eager":
        return eager
    from . import kernels  # imports triton

    return kernels


def _forward(gate, up, activation, impl) -> torch.Tensor:
    return _path(impl).forward(gate, up, activation)


def _backward(dy, gate, up, activation, impl) -> tuple[torch.Tensor, torch.Tensor]:
    return _path(impl).backward(dy, gate, up, activation)


_ARGUMENTS = "Tensor gate, Tensor up, str activation, str impl"
_operator = define(
    f"{NAME}({_ARGUMENTS}) -> Tensor", _forward, lambda gate, *_: gate.new_empty(gate.shape)
)
_backward_operator = define(
    f"{NAME}_backward(Tensor dy, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _backward,
    lambda dy, gate, *_: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
)


class _GatedActivation(Operation):
    @staticmethod
    def forward(ctx, gate, up, activation, impl):
        with Operation.below_autograd():
            y = _operator(gate, up, activation, impl)
        ctx.save_for_backward(gate, up)
        ctx.path = (activation, impl)
        return y

    @staticmethod
    @once(NAME)
    def backward(ctx, dy):
        with Operation.below_autograd():
            dgate, dup = _backward_operator(dy, *ctx.saved_tensors, *ctx.path)
        return dgate, dup, None, None


differentiate(NAME, _GatedActivation)
