"""`attention`: checks, choice of path, the torch operators."""

import torch
from torch.nn import functional

from ...core import call, checks
from ...core.registration import Operation, define, differentiate, once
from ...core.types import Choice, Cost, Unavailable
from .. import passes
from . import eager, reference
from .whole import whole_pass

NAME = "attention"
_LONG = 512  # keys


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    """Return `softmax(scale · Q Kᵀ) V` (Vaswani et al., arXiv 1706.03762, §3.2.1).

    What `torch.nn.functional.scaled_dot_product_attention` computes: on a CPU over bf16 in a pass,
    or by plain products of blocks; elsewhere, and of one query that is faster so, by torch's own.

    Args:
        q: [B, H, T, D], floating.
        k: [B, G, S, D], of q's dtype; H is a multiple of G, heads share keys in order.
        v: [B, G, S, E], likewise.
        mask: [B, 1, T, S] or [1, 1, T, S], bool: which keys a query sees; None, all. A query that
            sees none gets 0; where torch's own runs, what that gives.
        scale: above 0; None is 1/√D.
        causal: whether query i sees the keys up to i only; S must be T then, and mask None.
        impl: None for the best that applies, or "eager", "reference".

    Returns:
        [B, H, T, E], on a CPU in memory as [B, T, H, E]. Gradients flow to q, k and v.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, naming it.
        Unavailable: "triton", for which there is no kernel; a device without the operator.
    """
    path = plan(q, k, v, mask=mask, scale=scale, causal=causal, impl=impl)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    with call.outside_autocast(q):
        if path.impl == "reference":
            return reference.attention(q, k, v, mask, scale, causal)
        if path.strategy == "torch":
            return _by_torch(q, k, v, mask, scale, causal)
        mask = None if mask is None else mask.contiguous()
        return _operator(q, k, v, mask, scale, causal)


def _by_torch(q, k, v, mask, scale, causal) -> torch.Tensor:
    (H, T), G = q.shape[1:3], k.shape[1]
    options = {"attn_mask": mask, "scale": scale, "is_causal": causal}
    if H == G:
        return functional.scaled_dot_product_attention(q, k, v, **options)
    if T == 1 and q.device.type == "cpu":  # it would repeat the keys; heads are queries instead
        q = q.reshape(len(q), G, H // G, -1)
        y = functional.scaled_dot_product_attention(q, k, v, **options)
        return y.reshape(len(q), H, 1, -1)
    return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


def plan(q, k, v, *, mask=None, scale=None, causal=False, impl=None) -> call.Path:
    """Check the arguments of `attention` and choose its path; runs nothing."""
    checks.tensor(NAME, "q", q, (None,) * 4, q)
    B, H, T, D = q.shape
    checks.tensor(NAME, "k", k, (B, None, None, D), q)
    checks.tensor(NAME, "v", v, (B, k.shape[1], k.shape[2], None), q)
    for name, value in (("k", k), ("v", v)):
        if value.dtype != q.dtype:
            raise TypeError(f"{NAME}: {name} is {value.dtype}, but q is {q.dtype}")
    if not k.shape[1] or H % k.shape[1]:
        raise ValueError(f"{NAME}: q has {H} heads, which {k.shape[1]} of k cannot share equally")
    if not k.shape[2]:
        raise ValueError(f"{NAME}: k must have shape (B, G, S, D) with S > 0, got {tuple(k.shape)}")
    if causal and k.shape[2] != T:
        raise ValueError(f"{NAME}: causal needs as many keys as queries, got {k.shape[2]} and {T}")
    if mask is not None:
        _check_mask(mask, q, k.shape[2], causal)
    numeric = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if scale is not None and not (numeric and scale > 0):
        raise ValueError(f"{NAME}: scale must be None or a number above 0, got {scale!r}")
    checks.options(NAME, 0.0, impl)
    if impl == "triton":
        raise Unavailable(f"{NAME}: there is no Triton kernel, since torch has its own on GPUs")
    if impl is None and q.device.type not in ("cpu", "meta"):
        return call.Path("eager", "torch", "torch's own kernels serve this device")
    if impl is None and T == 1 and not causal and _is_torchs(q, k, v):
        return call.Path("eager", "torch", "torch's own kernel is faster at one query of these")
    path = passes.chosen(NAME, impl or "eager", q)
    return path._replace(reason="the tensors are on the CPU") if impl is None else path


def _is_torchs(q, k, v) -> bool:
    """Whether one query is torch's: no pass takes it, and torch is not slow at it.

    Over bf16 and heads with keys of their own it is (docs/benchmarks.md, Attention). In a program
    that is compiled there is no asking for a pass.
    """
    if torch.compiler.is_compiling() or whole_pass(q, k, v) is not None:
        return False
    alone = k.shape[1] == q.shape[1]
    return not (alone and q.dtype == torch.bfloat16 and k.shape[2] >= _LONG)


def _check_mask(mask, q, keys, causal) -> None:
    wanted = (f"1 or {q.shape[0]}", 1, q.shape[2], keys)
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"{NAME}: mask must be a bool tensor, got {kind}")
    if mask.shape[1:] != wanted[1:] or mask.shape[0] not in (1, q.shape[0]):
        text = ", ".join(map(str, wanted))
        raise ValueError(f"{NAME}: mask must have shape ({text}), got {tuple(mask.shape)}")
    if mask.device != q.device:
        raise ValueError(f"{NAME}: mask is on {mask.device}, but q is on {q.device}")
    if causal:
        raise ValueError(f"{NAME}: causal and a mask exclude each other")


def explain(q, k, v, *, mask=None, scale=None, causal=False, impl=None) -> Choice:
    """The path `attention` takes for these arguments, why, and what it costs."""
    path = plan(q, k, v, mask=mask, scale=scale, causal=causal, impl=impl)
    if path.impl == "eager" and path.strategy != "torch" and whole_pass(q, k, v) is not None:
        path = path._replace(
            strategy="one_pass", reason=f"{path.reason} and one compiled pass is all of it"
        )
    elif path.strategy != "torch":
        path = passes.told(path, q)
    return Choice(NAME, *path, cost(q, k, v, causal))


def cost(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Cost:
    """Forward: both products, half of each where it is causal; q, k, v read and y written once."""
    B, H, T, D = q.shape
    S, E = v.shape[2:]
    moved = q.numel() + k.numel() + v.numel() + B * H * T * E
    return Cost(2 * B * H * T * S * (D + E) // (2 if causal else 1), q.dtype.itemsize * moved)


def _forward_fake(q, k, v, mask, scale, causal):
    B, H, T, _ = q.shape
    y = q.new_empty(B, T, H, v.shape[3]).transpose(1, 2)
    dtype = torch.promote_types(q.dtype, torch.float32)
    return y, q.new_empty(B * H * T, 2, dtype=dtype)


def _backward_fake(dy, q, k, v, mask, kept, scale, causal):
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? mask"
_OPTIONS = "float scale, bool causal"
_operator = define(
    f"{NAME}({_ARGUMENTS}, {_OPTIONS}) -> Tensor",
    lambda *arguments: eager.forward(*arguments)[0],
    lambda *arguments: _forward_fake(*arguments)[0],
)
_forward_operator = define(
    f"{NAME}_forward({_ARGUMENTS}, {_OPTIONS}) -> (Tensor, Tensor)", eager.forward, _forward_fake
)
_backward_operator = define(
    f"{NAME}_backward(Tensor dy, {_ARGUMENTS}, Tensor kept, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    eager.backward,
    _backward_fake,
)


class _Attention(Operation):
    @staticmethod
    def forward(ctx, q, k, v, mask, scale, causal):
        with Operation.below_autograd():
            y, kept = _forward_operator(q, k, v, mask, scale, causal)
        ctx.save_for_backward(q, k, v, mask, kept)
        ctx.options = (scale, causal)
        return y

    @staticmethod
    @once(NAME)
    def backward(ctx, dy):
        with Operation.below_autograd():
            gradients = _backward_operator(dy, *ctx.saved_tensors, *ctx.options)
        return *gradients, None, None, None


differentiate(NAME, _Attention)
