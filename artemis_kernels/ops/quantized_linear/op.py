"""`quantized_linear`: a frozen weight's bare product, for layers that carry no adapter."""

import torch

from ...core import base, call, checks, packed_choice, tables
from ...core.products import column_sum
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
from ...core.types import Choice, Cost
from ..bases import held
from . import reference

NAME = "quantized_linear"


def quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    *,
    bias: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Return `x Wᵀ + bias` for a frozen weight, in 8 or 4 bits as a rule (docs/quantization.md).

    Args:
        x: [..., in], floating. The call computes in x's dtype (autocast's under autocast); the
            result has that dtype.
        weight: a `QuantizedWeight` of shape [out, in]; or a tensor, as `lora_linear` takes it: in
            bf16 a CPU with bf16 dot products multiplies it by a pass of our own, forward and dX.
        bias: [out] or None, any floating dtype.
        impl: None for the best that applies, or "triton", "eager", "reference".

    Returns:
        [..., out]. Gradients flow to x and bias.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, naming it.
        Unavailable: a path asked for by `impl` that cannot run, saying why.
    """
    path = plan(x, weight, bias=bias, impl=impl)
    dtype = call.compute_dtype(x)
    x = x.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    with call.outside_autocast(x):
        if path.impl == "reference":
            return reference.quantized_linear(x, call.dense_weight(weight, dtype), bias).to(dtype)
        data, quantizers = call.weight_tensors(weight, dtype)
        y = _operator(x.reshape(-1, x.shape[-1]), data, bias, path.impl, path.strategy, *quantizers)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def plan(x, weight, *, bias=None, impl=None) -> call.Path:
    """Check the arguments of `quantized_linear` and choose its path; runs nothing."""
    checks.input_tensor(NAME, x)
    checks.weight(NAME, weight, x)
    checks.optional(NAME, "bias", bias, (weight.shape[0],), x)
    checks.options(NAME, 0.0, impl)
    checks.weight_dtype(NAME, weight, x)
    dtype = call.compute_dtype(x)
    impl, reason = call.implementation(NAME, impl, dtype, x.device, call.trains(weight))
    if impl == "reference":
        return call.Path(impl, "composed", reason)
    if isinstance(weight, torch.Tensor):
        return call.Path(impl, "product", reason)
    out_features, in_features = weight.shape
    trains = torch.is_grad_enabled() and x.requires_grad
    case = Case(
        NAME, call.rows(x), in_features, out_features, 0, named(dtype),
        weight_of(weight), trains,
    )  # fmt: skip
    strategy, why = tables.choice(case, impl, x.device, usual(case, impl, weight, x.device))
    return call.Path(impl, strategy, f"{reason} and {why}")


def usual(case: Case, impl: str, weight: QuantizedWeight, device: torch.device) -> tuple[str, str]:
    """`(strategy, reason)` where no table says otherwise."""
    if impl == "eager":
        suffix, why = base.packed_strategy(weight, case.rows)
        return "product" + suffix, why.removeprefix(" and ")
    suffix, why = packed_choice.product(weight, case.rows, 0, case.torch_dtype, device)
    return "product" + suffix, why


def explain(x, weight, **options) -> Choice:
    """The path `quantized_linear` takes for these arguments, why, and what it costs."""
    path = plan(x, weight, **options)
    rows = x.numel() // max(x.shape[-1], 1)
    size = call.compute_dtype(x).itemsize
    return Choice(
        NAME, *path, base.as_held(cost(rows, *reversed(weight.shape), size), weight, size)
    )


def cost(m: int, k: int, n: int, itemsize: int) -> Cost:
    """Forward: x and W read, y written, once."""
    return Cost(flops=2 * m * k * n, bytes=itemsize * (m * k + k * n + m * n))


def _forward(
    x, weight, bias, impl, strategy, weight_scale=None, weight_offset=None
) -> torch.Tensor:
    frozen = held(impl, weight, weight_scale, weight_offset, strategy)
    if impl == "eager":
        return frozen.product(x, bias)
    from . import fused  # imports triton

    return fused.forward(x, frozen, bias)


def _input_gradient(impl: str, dy: torch.Tensor, frozen) -> torch.Tensor:
    if impl == "eager":
        return frozen.input_gradient(dy)
    from . import fused  # imports triton

    return fused.input_gradient(dy, frozen)


def _forward_fake(x, weight, bias, impl, strategy, weight_scale=None, weight_offset=None):
    return x.new_empty(x.shape[0], weight.shape[0])


def _backward(dy, weight, impl, strategy, needs, weight_scale=None, weight_offset=None):
    needs_x, needs_bias = needs
    frozen = held(impl, weight, weight_scale, weight_offset, strategy)
    dx = _input_gradient(impl, dy, frozen) if needs_x else None
    dbias = column_sum(dy).to(dy.dtype) if needs_bias else None
    return needed((dx, dbias), needs)


def _backward_fake(dy, weight, impl, strategy, needs, weight_scale=None, weight_offset=None):
    dx, dbias = dy.new_empty(dy.shape[0], base.in_features(weight)), dy.new_empty(dy.shape[1])
    return empty_like_needed((dx, dbias), needs)


_ARGUMENTS = f"Tensor x, Tensor weight, Tensor? bias, str impl, str strategy, {base.SCHEMA}"
_operator = define(f"{NAME}({_ARGUMENTS}) -> Tensor", _forward, _forward_fake)
_forward_operator = define(f"{NAME}_forward({_ARGUMENTS}) -> Tensor", _forward, _forward_fake)
_backward_operator = define(
    f"{NAME}_backward(Tensor dy, Tensor weight, str impl, str strategy, bool[] needs, "
    f"{base.SCHEMA}) -> Tensor[]",
    _backward,
    _backward_fake,
)


class _QuantizedLinear(Operation):
    @staticmethod
    def forward(ctx, x, weight, bias, impl, strategy, weight_scale=None, weight_offset=None):
        with Operation.below_autograd():
            y = _forward_operator(x, weight, bias, impl, strategy, weight_scale, weight_offset)
        ctx.needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[2])
        ctx.save_for_backward(weight, weight_scale, weight_offset)
        ctx.path = (impl, strategy)
        return y

    @staticmethod
    @once(NAME)
    def backward(ctx, dy):
        weight, *quantizers = ctx.saved_tensors
        with Operation.below_autograd():
            gradients = _backward_operator(dy, weight, *ctx.path, list(ctx.needs), *quantizers)
        dx, dbias = by_place(gradients, ctx.needs)
        return dx, None, dbias, *(None,) * 4


differentiate(NAME, _QuantizedLinear)
