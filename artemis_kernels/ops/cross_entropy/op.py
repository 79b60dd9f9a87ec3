"""`cross_entropy`: checks, choice of path, the torch operators."""

import torch

from ...core import call, checks
from ...core.registration import Operation, define, differentiate, once
from ...core.types import Choice, Cost
from .. import passes
from . import eager, reference

NAME = "cross_entropy"
REDUCTIONS = ("mean", "sum", "none")
_FLOPS = 8  # of an element, an exponential counted as five


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: str | None = None,
) -> torch.Tensor:
    """Return `−log softmax(logits)[target]`, as `torch.nn.functional.cross_entropy` of fp32 logits.

    The logits are read as they are stored, once forward and once backward; no copy of them in fp32
    is made, and no matrix of probabilities is kept (docs/cross_entropy.md).

    Args:
        logits: [..., classes], floating.
        target: [...], int64: a class, or `ignore_index`, which counts for nothing.
        reduction: "mean" over those that count, "sum", or "none".
        impl: None for the best that applies, or "triton", "eager", "reference".

    Returns:
        0-d, or [...] for "none"; fp32, fp64 for fp64 logits. A gradient, in their dtype, flows to
        the logits. As in torch, the mean over nothing is nan.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, naming it; a target
            that is no class (on a GPU it gives nan, since nothing is read back from there).
        Unavailable: a path asked for by `impl` that cannot run, saying why.
    """
    path = plan(logits, target, ignore_index=ignore_index, reduction=reduction, impl=impl)
    rows, wanted = logits.reshape(-1, logits.shape[-1]), target.reshape(-1).contiguous()
    with call.outside_autocast(logits):
        if path.impl == "reference":
            losses = reference.cross_entropy(rows, wanted, ignore_index)
        else:
            losses = _operator(rows, wanted, ignore_index, path.impl)
        if reduction == "none":
            return losses.reshape(target.shape)
        total = losses.sum()
        return total if reduction == "sum" else total / (wanted != ignore_index).sum()


def plan(logits, target, *, ignore_index=-100, reduction="mean", impl=None) -> call.Path:
    """Check the arguments of `cross_entropy` and choose its path; runs nothing."""
    _check(logits, target, ignore_index, reduction)
    checks.options(NAME, 0.0, impl)
    return passes.chosen(NAME, impl, logits)


def _check(logits, target, ignore_index, reduction) -> None:
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise TypeError(f"{NAME}: logits must be a floating-point tensor, got {kind}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"{NAME}: logits must have shape (..., classes), got {tuple(logits.shape)}"
        )
    if not isinstance(target, torch.Tensor) or target.dtype != torch.int64:
        kind = target.dtype if isinstance(target, torch.Tensor) else type(target).__name__
        raise TypeError(f"{NAME}: target must be an int64 tensor, got {kind}")
    if target.shape != logits.shape[:-1]:
        wanted = tuple(logits.shape[:-1])
        raise ValueError(f"{NAME}: target must have shape {wanted}, got {tuple(target.shape)}")
    if target.device != logits.device:
        raise ValueError(f"{NAME}: target is on {target.device}, but logits are on {logits.device}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{NAME}: ignore_index must be an int, got {ignore_index!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{NAME}: reduction must be one of {REDUCTIONS}, got {reduction!r}")


def explain(logits, target, **options) -> Choice:
    """The path `cross_entropy` takes for these arguments, why, and what it costs."""
    path = passes.told(plan(logits, target, **options), logits)
    return Choice(NAME, *path, cost(target.numel(), logits.shape[-1], logits.dtype.itemsize))


def cost(m: int, n: int, itemsize: int) -> Cost:
    """Forward: the logits read once."""
    return Cost(flops=_FLOPS * m * n, bytes=itemsize * m * n)


def _forward(logits, target, ignored, impl) -> tuple[torch.Tensor, torch.Tensor]:
    if impl == "eager":
        _check_classes(target, ignored, logits.shape[1])
        return eager.forward(logits, target, ignored)
    from . import kernels  # imports triton

    return kernels.forward(logits, target, ignored)


def _check_classes(target: torch.Tensor, ignored: int, classes: int) -> None:
    """Refuse what is no class, where looking costs no synchronization."""
    if not target.is_cpu:
        return
    bad = target[((target < 0) | (target >= classes)) & (target != ignored)]
    if bad.numel():
        raise ValueError(
            f"{NAME}: target must be in [0, {classes}) or {ignored} (ignore_index),"
            f" got {bad[0].item()}"
        )


def _forward_fake(logits, target, ignored, impl):
    dtype = torch.promote_types(logits.dtype, torch.float32)
    m = logits.shape[0]
    return logits.new_empty(m, dtype=dtype), logits.new_empty(m, 2, dtype=dtype)


def _backward(d, logits, target, kept, ignored, impl) -> torch.Tensor:
    if impl == "eager":
        return eager.backward(d, logits, target, kept, ignored)
    from . import kernels  # imports triton

    return kernels.backward(d, logits, target, kept, ignored)


def _backward_fake(d, logits, target, kept, ignored, impl):
    return logits.new_empty(logits.shape)


_ARGUMENTS = "Tensor logits, Tensor target, int ignored, str impl"
_operator = define(
    f"{NAME}({_ARGUMENTS}) -> Tensor",
    lambda *arguments: _forward(*arguments)[0],
    lambda *arguments: _forward_fake(*arguments)[0],
)
_forward_operator = define(
    f"{NAME}_forward({_ARGUMENTS}) -> (Tensor, Tensor)", _forward, _forward_fake
)
_backward_operator = define(
    f"{NAME}_backward(Tensor d, Tensor logits, Tensor target, Tensor kept, int ignored, "
    "str impl) -> Tensor",
    _backward,
    _backward_fake,
)


class _CrossEntropy(Operation):
    @staticmethod
    def forward(ctx, logits, target, ignored, impl):
        with Operation.below_autograd():
            losses, kept = _forward_operator(logits, target, ignored, impl)
        ctx.save_for_backward(logits, target, kept)
        ctx.path = (ignored, impl)
        return losses

    @staticmethod
    @once(NAME)
    def backward(ctx, d):
        with Operation.below_autograd():
            dlogits = _backward_operator(d, *ctx.saved_tensors, *ctx.path)
        return dlogits, None, None, None


differentiate(NAME, _CrossEntropy)
