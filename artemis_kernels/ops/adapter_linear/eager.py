"""`adapter_linear` in plain torch calls, forward and hand-written backward: the fast CPU path.

Two strategies, the same function (docs/adapter_linear.md):

`plain`   the bottleneck reads y0 = x Wᵀ + bias, which is kept for dD; x is not.
`folded`  the down-projection is folded through the base, F = D W and c = D bias + b_d, so that
          z = x Fᵀ + c and y0 is neither kept nor read: dD = (dzᵀ x) Wᵀ + (Σ dz) biasᵀ and
          dX = dY W + dz F.
"""

import torch

from ...core.base import Base
from ...core.eight_bit_rows import Rounded
from ...core.products import LowRank, accumulator, column_sum, outer_gradient, project
from ..bottleneck_adapter.branch import Branch, BranchNeeds


def forward(
    x: torch.Tensor,  # [M, in]
    base: Base,  # of [out, in]
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
    rounded: Rounded | None = None,  # x in 8 bits, where another product made it
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y [M, out], z [M, width] and what dD needs: F [width, in] (folded), y0 (plain)."""
    branch = Branch(up, bias_up, scale, scale_tensor, activation, dropout_p, seed)
    y0 = base.product(x, bias, rounded)
    if strategy.startswith("plain"):
        z = project(y0, down, bias_down)
        return branch.added(y0, z), z, y0
    f = base.folded(down, x.dtype)
    z = project(x, f, folded_bias(down, bias, bias_down))
    return branch.add_(y0, z), z, f


def backward(
    dy: torch.Tensor,  # [M, out]
    x: torch.Tensor | None,  # [M, in]; None unless a folded `down` needs a gradient
    base: Base,
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
    into: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of x, down, up, scale_tensor, bias, bias_down and bias_up.

    That of x is added to `into` [M, in] in place, where it is given.
    """
    needs_x, needs_down, needs_up, needs_scale, needs_bias, needs_bias_down, needs_bias_up = needs
    needs_dz = needs_x or needs_down or needs_bias or needs_bias_down
    branch = Branch(up, bias_up, scale, scale_tensor, activation, dropout_p, seed).backward(
        dy, z, BranchNeeds(needs_dz, needs_up, needs_scale, needs_bias_up)
    )
    dz, dz_sum = branch.dz, branch.dz_sum
    dx = ddown = dbias = dbias_down = None
    if strategy.startswith("plain"):
        if needs_x:
            dx = base.input_gradient(LowRank(dz, down.t()).plus(dy), into)
        if needs_down:
            ddown = outer_gradient(dz, kept).to(down.dtype)
    else:
        if needs_x:
            dx = base.input_gradient(dy, into, LowRank(dz, kept.t()))
        if needs_down:
            ddown = base.unfolded(outer_gradient(dz, x), dy.dtype)
            if bias is not None:
                ddown.addr_(dz_sum.to(ddown.dtype), bias.to(ddown.dtype))
            ddown = ddown.to(down.dtype)
    if needs_bias_down:
        dbias_down = dz_sum.to(bias_down.dtype)
    if needs_bias:
        through = torch.mv(down.t().to(dz_sum.dtype), dz_sum)
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
