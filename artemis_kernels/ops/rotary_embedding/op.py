"""`rotary_embedding`: checks, choice of path, the torch operators."""

import torch

from ...core import call, checks
from ...core.registration import Operation, define, differentiate, once
from ...core.types import Choice, Cost, Unavailable
from .. import passes
from . import eager, reference

NAME = "rotary_embedding"


def rotary_embedding(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q and k turned by their positions: `x·cos + (−x₂, x₁)·sin` of a head's halves.

    Su et al., arXiv 2104.09864, §3.4.2, in the order of halves that transformers stores.
    Computed in fp32 and rounded once; transformers rounds both products too.

    Args:
        q: [B, H, T, D], floating, D even.
        k: [B, G, T, D], of q's dtype.
        cos, sin: [B, T, D] or [1, T, D], both, any floating dtype, frozen.
        impl: None for the best that applies, or "triton", "eager", "reference".

    Returns:
        Two tensors like q and k, contiguous. Gradients flow to q and k.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, naming it.
        Unavailable: a path asked for by `impl` that cannot run, saying why; a cos or sin that asks
            for a gradient, which only the reference gives.
    """
    path = plan(q, k, cos, sin, impl=impl)
    with call.outside_autocast(q):
        if path.impl == "reference":
            return reference.rotary_embedding(q, k, cos, sin)
        return _operator(q, k, cos, sin, path.impl)


def plan(q, k, cos, sin, *, impl=None) -> call.Path:
    """Check the arguments of `rotary_embedding` and choose its path; runs nothing."""
    checks.tensor(NAME, "q", q, (None,) * 4, q)
    B, _, T, D = q.shape
    checks.tensor(NAME, "k", k, (B, None, T, D), q, "q")
    if D % 2:
        raise ValueError(f"{NAME}: q must have an even last dimension, got {tuple(q.shape)}")
    checks.same_dtype(NAME, "k", k, q.dtype, "q")
    checks.tensor(NAME, "cos", cos, (None, T, D), q, "q")
    if cos.shape[0] not in (1, B):
        raise ValueError(
            f"{NAME}: cos must have shape (1 or {B}, {T}, {D}), got {tuple(cos.shape)}"
        )
    checks.tensor(NAME, "sin", sin, tuple(cos.shape), q, "q")
    checks.options(NAME, 0.0, impl)
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        if impl not in (None, "reference"):
            raise Unavailable(
                f"{NAME}: impl={impl!r} takes frozen cos and sin, but one requires a gradient"
            )
        return call.Path(
            "reference", "composed", "cos or sin require a gradient, which only the reference gives"
        )
    return passes.chosen(NAME, impl, q)


def explain(q, k, cos, sin, *, impl=None) -> Choice:
    """The path `rotary_embedding` takes for these arguments, why, and what it costs."""
    path = passes.told(plan(q, k, cos, sin, impl=impl), q)
    return Choice(NAME, *path, cost(q.numel() + k.numel(), q.dtype.itemsize))


def cost(elements: int, itemsize: int) -> Cost:
    """Forward: q and k read and written once."""
    return Cost(flops=3 * elements, bytes=2 * itemsize * elements)


def _path(impl: str):
    if impl == "eager":
        return eager
    from . import kernels  # imports triton

    return kernels


def _forward(q, k, cos, sin, impl) -> tuple[torch.Tensor, torch.Tensor]:
    return _path(impl).forward(q, k, cos, sin)


def _backward(dq, dk, cos, sin, impl) -> tuple[torch.Tensor, torch.Tensor]:
    return _path(impl).backward(dq, dk, cos, sin)


def _backward_fake(dq, dk, cos, sin, impl):
    like = [(d, (d.shape[0], d.shape[2], d.shape[1], d.shape[3])) for d in (dq, dk)]
    return tuple(d.new_empty(shape).transpose(1, 2) for d, shape in like)


_operator = define(
    f"{NAME}(Tensor q, Tensor k, Tensor cos, Tensor sin, str impl) -> (Tensor, Tensor)",
    _forward,
    lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
)
_backward_operator = define(
    f"{NAME}_backward(Tensor dq, Tensor dk, Tensor cos, Tensor sin, str impl) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _RotaryEmbedding(Operation):
    @staticmethod
    def forward(ctx, q, k, cos, sin, impl):
        with Operation.below_autograd():
            turned = _operator(q, k, cos, sin, impl)
        ctx.save_for_backward(cos, sin)
        ctx.impl = impl
        return turned

    @staticmethod
    @once(NAME)
    def backward(ctx, dq, dk):
        with Operation.below_autograd():
            dq, dk = _backward_operator(dq, dk, *ctx.saved_tensors, ctx.impl)
        return dq, dk, None, None, None


differentiate(NAME, _RotaryEmbedding)
