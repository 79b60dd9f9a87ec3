"""`rms_norm`: checks, choice of path, the torch operators."""

import torch

from ...core import call, checks
from ...core.registration import Operation, define, differentiate, once
from ...core.types import Choice, Cost
from .. import passes
from . import eager, reference

NAME = "rms_norm"


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, impl: str | None = None
) -> torch.Tensor:
    """Return `weight · x / √(mean x² + eps)` (Zhang and Sennrich, arXiv 1910.07467, §3).

    Computed in fp32 and rounded once; transformers' Llama rounds the normalized x too.

    Args:
        x: [..., n], floating.
        weight: [n], any floating dtype.
        eps: what is added to the mean of squares; at least 0.
        impl: None for the best that applies, or "triton", "eager", "reference".

    Returns:
        [..., n] in x's dtype. Gradients flow to x, and to weight in its dtype.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, naming it.
        Unavailable: a path asked for by `impl` that cannot run, saying why.
    """
    path = plan(x, weight, eps, impl=impl)
    with call.outside_autocast(x):
        if path.impl == "reference":
            return reference.rms_norm(x, weight, eps)
        y = _operator(x.reshape(-1, x.shape[-1]), weight, float(eps), path.impl)
    return y.reshape(x.shape)


def plan(x, weight, eps=1e-6, *, impl=None) -> call.Path:
    """Check the arguments of `rms_norm` and choose its path; runs nothing."""
    checks.input_tensor(NAME, x)
    if x.shape[-1] == 0:
        raise ValueError(f"{NAME}: x must have shape (..., n) with n > 0, got {tuple(x.shape)}")
    checks.tensor(NAME, "weight", weight, (x.shape[-1],), x)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"{NAME}: eps must be a number of at least 0, got {eps!r}")
    checks.options(NAME, 0.0, impl)
    return passes.chosen(NAME, impl, x)


def explain(x, weight, eps=1e-6, *, impl=None) -> Choice:
    """The path `rms_norm` takes for these arguments, why, and what it costs."""
    path = passes.told(plan(x, weight, eps, impl=impl), x)
    return Choice(NAME, *path, cost(x.numel(), x.dtype.itemsize))


def cost(elements: int, itemsize: int) -> Cost:
    """Forward: x read and y written once."""
    return Cost(flops=4 * elements, bytes=2 * itemsize * elements)


def _path(impl: str):
    if impl == "eager":
        return eager
    from . import kernels  # imports triton

    return kernels


def _forward(x, weight, eps, impl) -> torch.Tensor:
    return _path(impl).forward(x, weight, eps)


def _backward(dy, x, weight, eps, impl, needs_weight) -> list[torch.Tensor]:
    dx, dweight = _path(impl).backward(dy, x, weight, eps, needs_weight)
    return [dx, dweight] if needs_weight else [dx]


def _backward_fake(dy, x, weight, eps, impl, needs_weight):
    dx = x.new_empty(x.shape)
    return [dx, weight.new_empty(weight.shape)] if needs_weight else [dx]


_ARGUMENTS = "Tensor x, Tensor weight, float eps, str impl"
_operator = define(f"{NAME}({_ARGUMENTS}) -> Tensor", _forward, lambda x, *_: x.new_empty(x.shape))
_backward_operator = define(
    f"{NAME}_backward(Tensor dy, {_ARGUMENTS}, bool needs_weight) -> Tensor[]",
    _backward,
    _backward_fake,
)


class _RMSNorm(Operation):
    @staticmethod
    def forward(ctx, x, weight, eps, impl):
        with Operation.below_autograd():
            y = _operator(x, weight, eps, impl)
        ctx.save_for_backward(x, weight)
        ctx.path = (eps, impl)
        return y

    @staticmethod
    @once(NAME)
    def backward(ctx, dy):
        needs_weight = ctx.needs_input_grad[1]
        with Operation.below_autograd():
            found = _backward_operator(dy, *ctx.saved_tensors, *ctx.path, needs_weight)
        return found[0], found[1] if needs_weight else None, None, None


differentiate(NAME, _RMSNorm)
