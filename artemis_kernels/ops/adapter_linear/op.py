"""`adapter_linear`: checks, choice of path, operator, autograd, and the public function."""

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

NAME = "adapter_linear"


def adapter_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    down: torch.Tensor,
    up: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    bias_down: torch.Tensor | None = None,
    bias_up: torch.Tensor | None = None,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    scale: Factor = 1.0,
    impl: str | None = None,
) -> torch.Tensor:
    """Return `y0 + scale · (dropout(act(y0 Dᵀ + b_d)) Uᵀ + b_u)` with `y0 = x Wᵀ + bias`.

    A bottleneck (Houlsby et al., arXiv 1902.00751, §2.1) on the output of a frozen linear layer.

    Args:
        x: [..., in], floating. The call computes in x's dtype (autocast's under autocast) and
            accumulates in fp32; the result has that dtype.
        weight: [out, in], of the compute dtype (any floating dtype under autocast), any strides.
            Frozen: one that requires a gradient is served by the reference only. Or a
            `QuantizedWeight` of that shape (docs/quantization.md).
        down: [width, out], any floating dtype; its gradient comes in that dtype.
        up: [out, width], likewise.
        bias: [out] or None, of the base layer.
        bias_down: [width] or None.
        bias_up: [out] or None.
        activation: "relu", "gelu", "gelu_tanh", "silu" or "identity".
        dropout_p: probability in [0, 1) of dropping a unit of the bottleneck.
        seed: of the mask over [..., width]: an int, or a one-element int64 tensor on x's device;
            None draws one from torch's generator.
        scale: a float, a 0-d tensor, which receives a gradient, or a pair of a float and a tensor,
            whose product it is.
        impl: None for the best that applies, or "triton", "eager", "reference".

    Returns:
        [..., out]. Gradients flow to x, down, up, a tensor scale and every bias.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, naming it.
        Unavailable: a path asked for by `impl` that cannot run, saying why.
    """
    path = plan(x, weight, down, up, bias=bias, bias_down=bias_down, bias_up=bias_up,
                activation=activation, dropout_p=dropout_p, seed=seed, scale=scale,
                impl=impl)  # fmt: skip
    dtype = call.compute_dtype(x)
    p, seed = call.dropout(dropout_p, seed, x)
    x = x.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    scale = Scale.of(scale)
    with call.outside_autocast(x):
        if path.impl == "reference":
            shape = (*x.shape[:-1], down.shape[0])
            keep, keep_scale = call.reference_mask(shape, p, seed, x.device)
            small = (None if t is None else t.to(dtype) for t in (down, up, bias_down, bias_up))
            down, up, bias_down, bias_up = small
            weight = call.dense_weight(weight, dtype)
            return reference.adapter_linear(
                x, weight, down, up, scale.value, bias, bias_down, bias_up, activation, keep,
                keep_scale,
            ).to(dtype)  # fmt: skip
        data, quantizers = call.weight_tensors(weight, dtype)
        y = _operator(
            x.reshape(-1, x.shape[-1]), data, down, up, bias, bias_down, bias_up, scale.number,
            scale.tensor, activation, p, seed, path.impl, path.strategy, *quantizers,
        )  # fmt: skip
    return y.reshape(*x.shape[:-1], weight.shape[0])


def plan(
    x, weight, down, up, *, bias=None, bias_down=None, bias_up=None, activation="gelu",
    dropout_p=0.0, seed=None, scale=1.0, impl=None,
) -> call.Path:  # fmt: skip
    """Check the arguments of `adapter_linear` and choose its path; runs nothing."""
    checks.input_tensor(NAME, x)
    checks.weight(NAME, weight, x)
    out_features, in_features = weight.shape
    checks.tensor(NAME, "down", down, (None, out_features), x)
    width = down.shape[0]
    checks.tensor(NAME, "up", up, (out_features, width), x)
    checks.optional(NAME, "bias", bias, (out_features,), x)
    checks.optional(NAME, "bias_down", bias_down, (width,), x)
    checks.optional(NAME, "bias_up", bias_up, (out_features,), x)
    checks.scale(NAME, scale, x)
    checks.seed(NAME, seed, x)
    checks.options(NAME, dropout_p, impl, activation)
    dtype = call.compute_dtype(x)
    checks.weight_dtype(NAME, weight, x)
    impl, reason = call.implementation(NAME, impl, dtype, x.device, call.trains(weight))
    if impl == "reference":
        return call.Path(impl, "composed", reason)
    trains = torch.is_grad_enabled() and (x.requires_grad or down.requires_grad)
    case = Case(
        NAME, call.rows(x), in_features, out_features, width, named(dtype),
        weight_of(weight), trains, dropout_p > 0,
    )  # fmt: skip
    strategy, why = tables.choice(case, impl, x.device, usual(case, impl, weight, x.device))
    return call.Path(impl, strategy, f"{reason} and {why}")


def usual(
    case: Case, impl: str, weight: torch.Tensor | QuantizedWeight, device: torch.device
) -> tuple[str, str]:
    """`(strategy, reason)` where no table says otherwise."""
    rows, k, n, width = case[1:5]
    if impl == "eager":
        strategy, why = fold_or_plain(rows, k, n, width, case.trains)
        suffix, also = base.packed_strategy(weight, rows)
        return strategy + suffix, why + also
    dtype = case.torch_dtype
    if isinstance(weight, QuantizedWeight):
        return packed_choice.adapter_strategy(weight, rows, width, case.trains, dtype, device)
    return tuning.adapter_strategy(rows, k, n, width, case.trains, dtype, device)


def fold_or_plain(m: int, k: int, n: int, width: int, trains: bool) -> tuple[str, str]:
    """The strategy with fewer multiply-adds per step on a CPU (docs/adapter_linear.md, Cost).

    In training folding may take a twentieth more, since plain keeps y0 and reads it again: at equal
    counts it was measured to take 1 to 3 % less time, with a tenth more as long.
    """
    passes = 3 if trains else 1  # forward; dX and the weights' gradients
    folded = passes * m * (k + n) + (2 if trains else 1) * k * n
    plain = passes * 2 * m * n
    if (20 * folded < 21 * plain) if trains else (folded < plain):  # whole: rows may be symbolic
        return "folded", "products folded through the base cost less than those with its output"
    return "plain", "products with the output cost less than those folded through the base"


def explain(x, weight, down, up, **options) -> Choice:
    """The path `adapter_linear` takes for these arguments, why, and what it costs."""
    path = plan(x, weight, down, up, **options)
    rows = x.numel() // max(x.shape[-1], 1)
    size = call.compute_dtype(x).itemsize
    folded = path.strategy.startswith("folded")
    total = cost(rows, weight.shape[1], weight.shape[0], down.shape[0], size, folded)
    return Choice(NAME, *path, base.as_held(total, weight, size))


def cost(m: int, k: int, n: int, width: int, itemsize: int, folded: bool) -> Cost:
    """Forward: the base product and the bottleneck's; each tensor read or written once.

    Plain reads the base's output again; folded forms `F = D W` (2·width·k·n FLOPs) instead.
    """
    thin = 2 * width * (m * (k + n) + k * n) if folded else 4 * m * n * width
    again = 0 if folded else m * n
    return Cost(
        flops=2 * m * k * n + thin,
        bytes=itemsize * (m * k + k * n + m * n + again + 2 * width * n),
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
    x, weight, down, up, bias, bias_down, bias_up, scale, scale_tensor, activation, dropout_p,
    seed, impl, strategy, weight_scale=None, weight_offset=None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    weight = held(impl, weight, weight_scale, weight_offset, strategy)
    y, z, kept = _path(impl).forward(
        x, weight, down, up, bias, bias_down, bias_up, scale, scale_tensor, activation, dropout_p,
        seed, strategy,
    )  # fmt: skip
    return y, z.contiguous(), kept


def _forward_fake(
    x, weight, down, up, bias, bias_down, bias_up, scale, scale_tensor, activation, dropout_p,
    seed, impl, strategy, weight_scale=None, weight_offset=None,
):  # fmt: skip
    y = x.new_empty(x.shape[0], weight.shape[0])
    z_dtype = x.dtype if impl == "eager" else torch.float32
    z = x.new_empty(x.shape[0], down.shape[0], dtype=z_dtype)
    plain = strategy.startswith("plain")
    kept = torch.empty_like(y) if plain else x.new_empty(down.shape[0], x.shape[1])
    return y, z, kept


def _only_y(*arguments) -> torch.Tensor:
    return _forward(*arguments)[0]


def _backward(
    dy, x, weight, down, up, bias, bias_down, bias_up, z, kept, scale, scale_tensor, activation,
    dropout_p, seed, impl, strategy, needs, weight_scale=None, weight_offset=None,
) -> list[torch.Tensor]:  # fmt: skip
    weight = held(impl, weight, weight_scale, weight_offset, strategy)
    gradients = _path(impl).backward(
        dy, x, weight, down, up, bias, bias_down, bias_up, z, kept, scale, scale_tensor,
        activation, dropout_p, seed, strategy, tuple(needs),
    )  # fmt: skip
    return needed(gradients, needs)


def _backward_fake(
    dy, x, weight, down, up, bias, bias_down, bias_up, z, kept, scale, scale_tensor, activation,
    dropout_p, seed, impl, strategy, needs, weight_scale=None, weight_offset=None,
):  # fmt: skip
    dx = dy.new_empty(dy.shape[0], base.in_features(weight))
    return empty_like_needed((dx, down, up, scale_tensor, bias, bias_down, bias_up), needs)


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor down, Tensor up, Tensor? bias, Tensor? bias_down, "
    "Tensor? bias_up, float scale, Tensor? scale_tensor, str activation, float dropout_p, "
    "Tensor? seed, str impl, str strategy, " + base.SCHEMA
)
_operator = define(f"{NAME}({_ARGUMENTS}) -> Tensor", _only_y, lambda *a: _forward_fake(*a)[0])
_forward_operator = define(
    f"{NAME}_forward({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake
)
_backward_operator = define(
    f"{NAME}_backward(Tensor dy, Tensor? x, Tensor weight, Tensor down, Tensor up, Tensor? bias, "
    "Tensor? bias_down, Tensor? bias_up, Tensor z, Tensor? kept, float scale, "
    "Tensor? scale_tensor, str activation, float dropout_p, Tensor? seed, str impl, str strategy, "
    f"bool[] needs, {base.SCHEMA}) -> Tensor[]",
    _backward,
    _backward_fake,
)


class _AdapterLinear(Operation):
    @staticmethod
    def forward(
        ctx, x, weight, down, up, bias, bias_down, bias_up, scale, scale_tensor, activation,
        dropout_p, seed, impl, strategy, weight_scale=None, weight_offset=None,
    ):  # fmt: skip
        with Operation.below_autograd():
            y, z, kept = _forward_operator(
                x, weight, down, up, bias, bias_down, bias_up, scale, scale_tensor, activation,
                dropout_p, seed, impl, strategy, weight_scale, weight_offset,
            )  # fmt: skip
        need = ctx.needs_input_grad
        ctx.needs = (need[0], need[2], need[3], need[8], need[4], need[5], need[6])
        plain, trains_down = strategy.startswith("plain"), need[2]
        kept_x = x if trains_down and not plain else None
        kept = kept if trains_down or not plain else None
        ctx.save_for_backward(
            kept_x, weight, down, up, bias, bias_down, bias_up, z, kept, weight_scale,
            weight_offset, scale_tensor, seed,
        )  # fmt: skip
        ctx.options = (activation, dropout_p, impl, strategy)
        ctx.scale = scale
        return y

    @staticmethod
    @once(NAME)
    def backward(ctx, dy):
        *operands, weight_scale, weight_offset, scale_tensor, seed = ctx.saved_tensors
        activation, dropout_p, impl, strategy = ctx.options
        with Operation.below_autograd():
            gradients = _backward_operator(
                dy, *operands, ctx.scale, scale_tensor, activation, dropout_p, seed, impl,
                strategy, list(ctx.needs), weight_scale, weight_offset,
            )  # fmt: skip
        dx, ddown, dup, dscale, dbias, dbias_down, dbias_up = by_place(gradients, ctx.needs)
        return dx, None, ddown, dup, dbias, dbias_down, dbias_up, None, dscale, *(None,) * 7


differentiate(NAME, _AdapterLinear)
