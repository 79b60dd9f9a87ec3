"""`lora_linear`: checks, choice of path, operator, autograd, and the public function."""

import functools

import torch

from ...core import base, call, checks, packed_choice, tables, tuning
from ...core.quantized import QuantizedWeight
from ...core.registration import (
    Operation,
    by_place,
    define,
    differentiate,
    empty_like_needed,
    needed,
    once,
)
from ...core.strategies import Case, named, weight_of
from ...core.types import Choice, Cost, Factor, Scale
from ..bases import held
from . import eager, reference

NAME = "lora_linear"


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scale: Factor,
    *,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Return `x Wᵀ + bias + scale · (dropout(x) Aᵀ) Bᵀ` (Hu et al., arXiv 2106.09685, §4.1).

    Args:
        x: [..., in], floating. The call computes in x's dtype (autocast's under autocast) and
            accumulates in fp32; the result has that dtype.
        weight: [out, in], of the compute dtype (any floating dtype under autocast), any strides.
            Frozen: one that requires a gradient is served by the reference only. Or a
            `QuantizedWeight` of that shape (docs/quantization.md).
        lora_a: [rank, in], any floating dtype; its gradient comes in that dtype.
        lora_b: [out, rank], likewise.
        scale: a float, a 0-d tensor, which receives a gradient, or a pair of a float and a tensor,
            whose product it is. The scale itself, not alpha/rank.
        bias: [out] or None.
        dropout_p: probability in [0, 1) of dropping an element of x on its way into `lora_a`.
        seed: of the mask: an int, or a one-element int64 tensor on x's device; None draws one
            from torch's generator. The mask is `dropout_mask(x.shape, dropout_p, seed, device)`.
        impl: None for the best that applies, or "triton", "eager", "reference".

    Returns:
        [..., out]. Gradients flow to x, lora_a, lora_b, a tensor scale and bias.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, naming it.
        Unavailable: a path asked for by `impl` that cannot run, saying why.
    """
    path = plan(x, weight, lora_a, lora_b, scale, bias=bias, dropout_p=dropout_p, seed=seed,
                impl=impl)  # fmt: skip
    dtype = call.compute_dtype(x)
    p, seed = call.dropout(dropout_p, seed, x)
    x = x.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    scale = Scale.of(scale)
    with call.outside_autocast(x):
        if path.impl == "reference":
            keep, keep_scale = call.reference_mask(x.shape, p, seed, x.device)
            a, b = lora_a.to(dtype), lora_b.to(dtype)
            weight = call.dense_weight(weight, dtype)
            return reference.lora_linear(x, weight, a, b, scale.value, bias, keep, keep_scale).to(
                dtype
            )
        data, quantizers = call.weight_tensors(weight, dtype)
        y = _operator(
            x.reshape(-1, x.shape[-1]), data, lora_a, lora_b, bias, scale.number, scale.tensor,
            p, seed, path.impl, path.strategy, *quantizers,
        )  # fmt: skip
    return y.reshape(*x.shape[:-1], weight.shape[0])


def plan(
    x, weight, lora_a, lora_b, scale, *, bias=None, dropout_p=0.0, seed=None, impl=None
) -> call.Path:
    """Check the arguments of `lora_linear` and choose its path; runs nothing."""
    checks.input_tensor(NAME, x)
    checks.weight(NAME, weight, x)
    out_features, in_features = weight.shape
    checks.tensor(NAME, "lora_a", lora_a, (None, in_features), x)
    rank = lora_a.shape[0]
    checks.tensor(NAME, "lora_b", lora_b, (out_features, rank), x)
    checks.optional(NAME, "bias", bias, (out_features,), x)
    checks.scale(NAME, scale, x)
    checks.seed(NAME, seed, x)
    checks.options(NAME, dropout_p, impl)
    dtype = call.compute_dtype(x)
    checks.weight_dtype(NAME, weight, x)
    impl, reason = call.implementation(NAME, impl, dtype, x.device, call.trains(weight))
    if impl == "reference":
        return call.Path(impl, "composed", reason)
    trains = torch.is_grad_enabled() and (x.requires_grad or lora_a.requires_grad)
    case = Case(
        NAME, call.rows(x), in_features, out_features, rank, named(dtype),
        weight_of(weight), trains, dropout_p > 0,
    )  # fmt: skip
    strategy, why = tables.choice(case, impl, x.device, usual(case, impl, weight, x.device))
    return call.Path(impl, strategy, f"{reason} and {why}" if why else reason)


def usual(
    case: Case, impl: str, weight: torch.Tensor | QuantizedWeight, device: torch.device
) -> tuple[str, str]:
    """`(strategy, reason)` where no table says otherwise; the reason may be empty."""
    rows, k, n, rank = case[1:5]
    if impl == "eager":
        suffix, why = base.packed_strategy(weight, rows)
        return "addmm" + suffix, why.removeprefix(" and ")
    dtype = case.torch_dtype
    if isinstance(weight, QuantizedWeight):
        return packed_choice.lora_strategy(weight, rows, rank, dtype, device)
    return tuning.lora_strategy(rows, k, n, rank, case.drops, dtype, device)


def explain(x, weight, lora_a, lora_b, scale, **options) -> Choice:
    """The path `lora_linear` takes for these arguments, why, and what it costs."""
    path = plan(x, weight, lora_a, lora_b, scale, **options)
    rows = x.numel() // max(x.shape[-1], 1)
    size = call.compute_dtype(x).itemsize
    total = cost(rows, weight.shape[1], weight.shape[0], lora_a.shape[0], size)
    return Choice(NAME, *path, base.as_held(total, weight, size))


def cost(m: int, k: int, n: int, rank: int, itemsize: int) -> Cost:
    """Forward: the base product, the two thin ones; x, W, A, B read and y written once."""
    return Cost(
        flops=2 * m * k * n + 2 * m * rank * (k + n),
        bytes=itemsize * (m * k + k * n + m * n + rank * (k + n)),
    )


@functools.cache
def _path(impl: str):
    """The module that implements `impl`; both have `forward` and `backward` of one signature.

    But for the weight, which comes as `bases.held` gives it.
    """
    if impl == "eager":
        return eager
    from . import fused  # imports triton

    return fused


def _forward(
    x, weight, lora_a, lora_b, bias, scale, scale_tensor, dropout_p, seed, impl, strategy,
    weight_scale=None, weight_offset=None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    weight = held(impl, weight, weight_scale, weight_offset, strategy)
    y, s = _path(impl).forward(
        x, weight, lora_a, lora_b, bias, scale, scale_tensor, dropout_p, seed, strategy
    )
    return y, s.contiguous()


def _forward_fake(
    x, weight, lora_a, lora_b, bias, scale, scale_tensor, dropout_p, seed, impl, strategy,
    weight_scale=None, weight_offset=None,
):  # fmt: skip
    y = x.new_empty(x.shape[0], weight.shape[0])
    s_dtype = x.dtype if impl == "eager" else torch.float32
    return y, x.new_empty(x.shape[0], lora_a.shape[0], dtype=s_dtype)


def _only_y(*arguments) -> torch.Tensor:
    return _forward(*arguments)[0]


def _backward(
    dy, x, weight, lora_a, lora_b, s, scale, scale_tensor, dropout_p, seed, impl, strategy, needs,
    weight_scale=None, weight_offset=None,
) -> list[torch.Tensor]:  # fmt: skip
    weight = held(impl, weight, weight_scale, weight_offset, strategy)
    gradients = _path(impl).backward(
        dy, x, weight, lora_a, lora_b, s, scale, scale_tensor, dropout_p, seed, strategy,
        tuple(needs),
    )  # fmt: skip
    return needed(gradients, needs)


def _backward_fake(
    dy, x, weight, lora_a, lora_b, s, scale, scale_tensor, dropout_p, seed, impl, strategy, needs,
    weight_scale=None, weight_offset=None,
):  # fmt: skip
    (rows, out_features), in_features = dy.shape, base.in_features(weight)
    dx, dbias = dy.new_empty(rows, in_features), dy.new_empty(out_features)
    return empty_like_needed((dx, lora_a, lora_b, scale_tensor, dbias), needs)


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, float scale, "
    "Tensor? scale_tensor, float dropout_p, Tensor? seed, str impl, str strategy, " + base.SCHEMA
)
_operator = define(f"{NAME}({_ARGUMENTS}) -> Tensor", _only_y, lambda *a: _forward_fake(*a)[0])
_forward_operator = define(
    f"{NAME}_forward({_ARGUMENTS}) -> (Tensor, Tensor)", _forward, _forward_fake
)
_backward_operator = define(
    f"{NAME}_backward(Tensor dy, Tensor? x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor s, "
    "float scale, Tensor? scale_tensor, float dropout_p, Tensor? seed, str impl, str strategy, "
    f"bool[] needs, {base.SCHEMA}) -> Tensor[]",
    _backward,
    _backward_fake,
)


class _LoRALinear(Operation):
    @staticmethod
    def forward(
        ctx, x, weight, lora_a, lora_b, bias, scale, scale_tensor, dropout_p, seed, impl, strategy,
        weight_scale=None, weight_offset=None,
    ):  # fmt: skip
        with Operation.below_autograd():
            y, s = _forward_operator(
                x, weight, lora_a, lora_b, bias, scale, scale_tensor, dropout_p, seed, impl,
                strategy, weight_scale, weight_offset,
            )  # fmt: skip
        need = ctx.needs_input_grad
        ctx.needs = (need[0], need[2], need[3], need[6], need[4])
        kept_x = x if ctx.needs[1] else None
        ctx.save_for_backward(
            kept_x, weight, lora_a, lora_b, s, scale_tensor, seed, weight_scale, weight_offset
        )
        ctx.options = (scale, dropout_p, impl, strategy)
        return y

    @staticmethod
    @once(NAME)
    def backward(ctx, dy):
        x, weight, lora_a, lora_b, s, scale_tensor, seed, *quantizers = ctx.saved_tensors
        scale, dropout_p, impl, strategy = ctx.options
        with Operation.below_autograd():
            gradients = _backward_operator(
                dy, x, weight, lora_a, lora_b, s, scale, scale_tensor, dropout_p, seed, impl,
                strategy, list(ctx.needs), *quantizers,
            )  # fmt: skip
        dx, da, db, dscale, dbias = by_place(gradients, ctx.needs)
        return dx, None, da, db, dbias, None, dscale, *(None,) * 6


differentiate(NAME, _LoRALinear)
