"""`bottleneck_adapter` in plain torch calls, forward and hand-written backward: the fast CPU path.

Only x and the pre-activation z [M, width] are kept:

    z  = x Dᵀ + b_d     y  = residual + σ·(dropout(act(z)) Uᵀ + b_u)     (branch.py: dz and below)
    dD = dzᵀ x          db_d = Σ dz          dX = dz D (+ dY where x is the residual)
"""

import torch

from ...core.products import LowRank, outer_gradient, project
from .branch import Branch, BranchNeeds


def forward(
    x: torch.Tensor,  # [M, hidden]
    down: torch.Tensor,  # [width, hidden]
    up: torch.Tensor,  # [hidden, width]
    bias_down: torch.Tensor | None,
    bias_up: torch.Tensor | None,
    residual: torch.Tensor | None,  # [M, hidden]; None = x
    scale: float,
    scale_tensor: torch.Tensor | None,
    activation: str,
    dropout_p: float,
    seed: torch.Tensor | None,
    strategy: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y [M, hidden] and z [M, width], both of x's dtype."""
    z = project(x, down, bias_down)
    branch = Branch(up, bias_up, scale, scale_tensor, activation, dropout_p, seed)
    return branch.added(x if residual is None else residual, z), z


def backward(
    dy: torch.Tensor,  # [M, hidden]
    x: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    bias_down: torch.Tensor | None,
    bias_up: torch.Tensor | None,
    z: torch.Tensor,
    scale: float,
    scale_tensor: torch.Tensor | None,
    activation: str,
    dropout_p: float,
    seed: torch.Tensor | None,
    strategy: str,
    residual_is_x: bool,
    needs: tuple[bool, ...],  # x, down, up, scale_tensor, bias_down, bias_up
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of x, down, up, scale_tensor, bias_down and bias_up."""
    needs_x, needs_down, needs_up, needs_scale, needs_bias_down, needs_bias_up = needs
    branch = Branch(up, bias_up, scale, scale_tensor, activation, dropout_p, seed).backward(
        dy, z, BranchNeeds(needs_up, needs_scale, needs_bias_up)
    )
    dx = ddown = dbias_down = None
    if needs_x:
        through = LowRank(branch.dz, down.t())
        dx = through.plus(dy) if residual_is_x else through.product(dy.dtype)
    if needs_down:
        ddown = outer_gradient(branch.dz, x).to(down.dtype)
    if needs_bias_down:
        dbias_down = branch.dz_sum.to(bias_down.dtype)
    return dx, ddown, branch.dup, branch.dscale, dbias_down, branch.dbias_up
