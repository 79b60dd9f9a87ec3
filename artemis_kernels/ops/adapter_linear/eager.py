"""`adapter_linear` in plain torch calls, forward and hand-written backward: the fast CPU path.

Two strategies, the same function (docs/adapter_linear.md):

`plain`   the bottleneck reads y0 = x Wᵀ + bias, which is kept for dD; x is not.
`folded`  the down-projection is folded through the base, F = D W and c = D bias + b_d, so that
          z = x Fᵀ + c and y0 is neither kept nor read: dD = (dzᵀ x) Wᵀ + (Σ dz) biasᵀ and
          dX = dY W + dz F.
"""

import torch
from torch.nn import functional

from ...core.products import accumulator, column_sum, outer_gradient
from ..bottleneck_adapter.eager import (
    BranchNeeds,
    branch_backward,
    expanded,
    preactivation,
    scaled_bias,
    units,
)


def forward(
    x: torch.Tensor,  # [M, in]
    weight: torch.Tensor,  # [out, in]
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y [M, out], z [M, width] and what dD needs: F [width, in] (folded), y0 (plain)."""
    if strategy == "plain":
        y0 = functional.linear(x, weight, bias)
        z = preactivation(y0, down, bias_down)
        h = units(z, activation, dropout_p, seed)
        return expanded(y0, h, up, bias_up, scale, scale_tensor), z, y0
    folded = torch.mm(down.to(x.dtype), weight)
    z = preactivation(x, folded, folded_bias(down, bias, bias_down))
    h = units(z, activation, dropout_p, seed)
    if scale_tensor is not None:
        h = h * scale_tensor
    y = functional.linear(x, weight, output_bias(bias, bias_up, scale, scale_tensor, x.dtype))
    y.addmm_(h, up.to(h.dtype).t(), alpha=scale)
    return y, z, folded


def backward(
    dy: torch.Tensor,  # [M, out]
    x: torch.Tensor | None,  # [M, in]; None unless a folded `down` needs a gradient
    weight: torch.Tensor,
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
    needs_dz = needs_x or needs_down or needs_bias or needs_bias_down
    branch = branch_backward(
        dy, up, bias_up, z, scale, scale_tensor, activation, dropout_p, seed,
        BranchNeeds(needs_dz, needs_up, needs_scale, needs_bias_up),
    )  # fmt: skip
    dz, d = branch.dz, down.to(dy.dtype)
    dx = ddown = dbias = dbias_down = None
    if strategy == "plain":
        if needs_x:
            dx = torch.mm(torch.addmm(dy, dz, d), weight)
        if needs_down:
            ddown = outer_gradient(dz, kept).to(down.dtype)
    else:
        if needs_x:
            dx = torch.mm(dy, weight).addmm_(dz, kept)
        if needs_down:
            ddown = torch.mm(outer_gradient(dz, x), weight.t())
            if bias is not None:
                ddown.addr_(column_sum(dz).to(bias.dtype), bias)
            ddown = ddown.to(down.dtype)
    if needs_bias_down:
        dbias_down = column_sum(dz).to(bias_down.dtype)
    if needs_bias:
        summed = column_sum(dz)
        through = torch.mv(down.t().to(summed.dtype), summed)
        dbias = (column_sum(dy) + through).to(bias.dtype)
    return dx, ddown, branch.dup, branch.dscale, dbias, dbias_down, branch.dbias_up


def folded_bias(
    down: torch.Tensor, bias: torch.Tensor | None, bias_down: torch.Tensor | None
) -> torch.Tensor | None:
    """`c = D bias + b_d` [width], in fp32 or better, or None where both are absent."""
    if bias is None:
        return bias_down
    wide = accumulator(torch.promote_types(down.dtype, bias.dtype))
    through = torch.mv(down.to(wide), bias.to(wide))
    return through if bias_down is None else through + bias_down


def output_bias(
    bias: torch.Tensor | None,
    bias_up: torch.Tensor | None,
    scale: float,
    scale_tensor: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """`bias + σ·b_u` [out], the bias of the one base product, or None where both are absent."""
    if bias_up is None:
        return bias
    extra = scaled_bias(bias_up, scale, scale_tensor)
    return (extra if bias is None else extra + bias).to(dtype)
