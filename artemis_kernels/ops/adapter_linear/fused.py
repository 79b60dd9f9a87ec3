"""`adapter_linear` in Triton: which launches, in which order.

    folded          F = D W, shrink (bias, activation, dropout), base product with its epilogue
    folded_vendor   the same with the vendor's base product and an update of its output
    plain           the vendor's base product, then the bottleneck's kernels on y0

Over a packed weight the strategy's end says how it is multiplied (`ops.packed.steps`).

Folded, with c = D bias + b_d: z = x Fᵀ + c, and y0 is neither kept nor read. Backward, with the
scale s:

    dz = (dY U)·mask·act'(z)     dX = dY W + s·dz F     dD = s·((dzᵀ x) Wᵀ + (Σ dz) biasᵀ)
    dU = s·dYᵀ h     db_d = s·Σ dz     db_u = s·Σ dY     dbias = Σ dY + s·(Σ dz) D

F and G = dzᵀ x are rounded to x's dtype for the vendor's products; all else is fp32 until its
store.
"""

from collections.abc import Mapping

import torch

from ...core import device, tuning
from ...core.device import Chip
from ...core.products import sums_dtype, through_weight
from ...core.tiling import Shape, by_shape
from ..bottleneck_adapter import fused as bottleneck
from ..low_rank.arguments import Dropout, Scale
from ..low_rank.steps import (
    Hidden,
    expand_gradients,
    like,
    shrunk,
    small_gradients,
    sum_over_rows,
)
from ..packed.round_rows import Rounded
from ..packed.steps import Packed, dense, expanded, product
from .folding import folded_bias


def forward(
    x: torch.Tensor,  # [M, in]
    weight: torch.Tensor | Packed,  # [out, in]
    down: torch.Tensor,  # [width, out]
    up: torch.Tensor,  # [out, width]
    bias: torch.Tensor | None,
    bias_down: torch.Tensor | None,
    bias_up: torch.Tensor | None,
    scale: float,
    scale_tensor: torch.Tensor | None,
    activation: str,
    dropout_p: float,
    seed: torch.Tensor | None,
    strategy: str,
    rounded: Mapping[str, Rounded] | None = None,  # x in 8 bits, where another product made it
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y [M, out], z [M, width] in fp32 and what dD needs: F [width, in], or y0 (plain)."""
    chip = device.chip(x.device)
    if strategy.startswith("plain"):
        y0 = product(x, weight, bias, chip, rounded=rounded)
        y, z = bottleneck.forward(
            y0, down, up, bias_down, bias_up, None, scale, scale_tensor, activation, dropout_p,
            seed, _bottleneck_strategy(Shape(y0.shape[0], 0, *up.shape, y0.dtype), False, chip),
        )  # fmt: skip
        return y, z, y0
    folded = torch.mm(down.to(x.dtype), dense(weight, x.dtype, chip))
    z, h = shrunk(
        x, folded, chip, stage="forward", bias=folded_bias(down, bias, bias_down), with_h=True,
        activation=activation, dropout=Dropout(dropout_p, seed),
    )  # fmt: skip
    y = expanded(
        x, weight, h, up, chip, vendor="vendor" in strategy, bias=bias, bias_low=bias_up,
        scale=Scale(scale, scale_tensor), rounded=rounded,
    )  # fmt: skip
    return y, z, folded


def backward(
    dy: torch.Tensor,  # [M, out]
    x: torch.Tensor | None,  # [M, in]; None unless a folded `down` needs a gradient
    weight: torch.Tensor | Packed,
    down: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    bias_down: torch.Tensor | None,
    bias_up: torch.Tensor | None,
    z: torch.Tensor,
    kept: torch.Tensor,  # F or y0, as forward returned it
    scale: float,
    scale_tensor: torch.Tensor | None,
    activation: str,
    dropout_p: float,
    seed: torch.Tensor | None,
    strategy: str,
    needs: tuple[bool, ...],  # x, down, up, scale_tensor, bias, bias_down, bias_up
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of x, down, up, scale_tensor, bias, bias_down and bias_up."""
    needs_x, needs_down, needs_up, needs_scale, needs_bias, needs_bias_down, needs_bias_up = needs
    sigma = Scale(scale, scale_tensor)
    dx = ddown = dbias = None
    chip = device.chip(dy.device)
    if strategy.startswith("plain"):
        dy0, *others = plain_backward(
            dy, down, up, bias, bias_down, bias_up, z, kept, scale, scale_tensor, activation,
            dropout_p, seed, needs, chip,
        )  # fmt: skip
        return product(dy0, weight.t(), None, chip) if needs_x else None, *others
    gradients = expand_gradients(
        dy, up, z, chip, hidden=Hidden(activation, Dropout(dropout_p, seed)), scale=sigma,
        wants_hidden=needs_x or needs_down or needs_bias or needs_bias_down, wants_b=needs_up,
        wants_dot=needs_scale,
        wants_columns=needs_bias or (bias_up is not None and (needs_scale or needs_bias_up)),
    )  # fmt: skip
    if needs_x:
        vendor = "vendor" in strategy
        dx = expanded(dy, weight.t(), gradients.hidden, kept.t(), chip, vendor=vendor, scale=sigma)
    if needs_down:
        ddown = _down_gradient(x, gradients.hidden, weight, bias, sigma, chip).to(down.dtype)
    if needs_bias:
        dbias = gradients.columns + sigma.of(gradients.hidden.sum(0) @ down.float())
    small = small_gradients(gradients, sigma, bias_up, needs_scale, needs_bias_down, needs_bias_up)
    return (
        dx,
        ddown,
        gradients.b if needs_up else None,
        small.scale,
        like(dbias, bias),
        like(small.bias_down, bias_down),
        like(small.bias_up, bias_up),
    )


def plain_backward(
    dy, down, up, bias, bias_down, bias_up, z, y0, scale, scale_tensor, activation, dropout_p, seed,
    needs, chip,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """`backward` of the plain strategy, with the gradient of y0 [M, out] in the place of x's."""
    needs_x, needs_bias = needs[0], needs[4]
    dy0, ddown, dup, dscale, dbias_down, dbias_up = bottleneck.backward(
        dy, y0, down, up, bias_down, bias_up, z, scale, scale_tensor, activation, dropout_p, seed,
        _bottleneck_strategy(Shape(dy.shape[0], 0, *up.shape, dy.dtype), True, chip), True,
        (needs_x or needs_bias, *needs[1:4], *needs[5:]),
    )  # fmt: skip
    dbias = dy0.sum(0, dtype=torch.float32) if needs_bias else None
    return dy0, ddown, dup, dscale, like(dbias, bias), dbias_down, dbias_up


@by_shape
def _bottleneck_strategy(shape: Shape, trains: bool, chip: Chip) -> str:
    return tuning.choose_bottleneck(shape, trains, chip)[0]


def _down_gradient(
    x: torch.Tensor,
    dz: torch.Tensor,
    weight: torch.Tensor | Packed,
    bias: torch.Tensor | None,
    scale: Scale,
    chip: Chip,
) -> torch.Tensor:
    """`s·((dzᵀ x) Wᵀ + (Σ dz) biasᵀ)` [width, out] in fp32."""
    through = x.new_empty(dz.shape[1], x.shape[1], dtype=sums_dtype(x.dtype))
    sum_over_rows(x, dz, through, chip)
    ddown = through_weight(through, dense(weight, x.dtype, chip)).float()
    if bias is not None:
        ddown.addr_(dz.sum(0), bias.float())
    return scale.of(ddown)
