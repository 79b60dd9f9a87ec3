"""`bottleneck_adapter` in plain torch calls, forward and hand-written backward: the fast CPU path.

Only x and the pre-activation z [M, width] are kept. With `h = dropout(act(z))`:

    y  = residual + σ·(h Uᵀ + b_u)     dU = σ·dYᵀ h             dh = σ·dY U
    dz = dh·mask/keep·act'(z)          dD = dzᵀ x               dX = dz D (+ dY where x is residual)
    db_d = Σ dz                        db_u = σ·Σ dY            dσ = Σ (dY U) ⊙ h + Σ dY·b_u
"""

from typing import NamedTuple

import torch

from ...core.activations import ACTIVATIONS
from ...core.dropped import Dropout, dropped
from ...core.products import accumulator, column_sum, inner, outer_gradient, project


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
    z = preactivation(x, down, bias_down)
    h = units(z, activation, dropout_p, seed)
    start = x if residual is None else residual
    return expanded(start, h, up, bias_up, scale, scale_tensor), z


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
    branch = branch_backward(
        dy, up, bias_up, z, scale, scale_tensor, activation, dropout_p, seed,
        BranchNeeds(needs_x or needs_down or needs_bias_down, needs_up, needs_scale, needs_bias_up),
    )  # fmt: skip
    dx = ddown = dbias_down = None
    if needs_x:
        d = down.to(dy.dtype)
        dx = torch.addmm(dy, branch.dz, d) if residual_is_x else torch.mm(branch.dz, d)
    if needs_down:
        ddown = outer_gradient(branch.dz, x).to(down.dtype)
    if needs_bias_down:
        dbias_down = column_sum(branch.dz).to(bias_down.dtype)
    return dx, ddown, branch.dup, branch.dscale, dbias_down, branch.dbias_up


def preactivation(
    x: torch.Tensor, down: torch.Tensor, bias_down: torch.Tensor | None
) -> torch.Tensor:
    """`x Dᵀ + b_d`, in x's dtype."""
    if bias_down is None:
        return project(x, down.to(x.dtype))
    return torch.addmm(bias_down.to(x.dtype), x, down.to(x.dtype).t())


def units(z: torch.Tensor, activation: str, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    """`h = dropout(act(z))`."""
    h = ACTIVATIONS[activation].forward(z)
    return dropped(h, Dropout(p, seed)) if p else h


def expanded(
    start: torch.Tensor,
    h: torch.Tensor,
    up: torch.Tensor,
    bias_up: torch.Tensor | None,
    scale: float,
    scale_tensor: torch.Tensor | None,
) -> torch.Tensor:
    """`start + σ·(h Uᵀ + b_u)` as a new tensor; the bias rides on the copy of `start`."""
    if scale_tensor is not None:
        h = h * scale_tensor
    if bias_up is None:
        return torch.addmm(start, h, up.to(h.dtype).t(), alpha=scale)
    y = start + scaled_bias(bias_up, scale, scale_tensor).to(start.dtype)
    return y.addmm_(h, up.to(h.dtype).t(), alpha=scale)


def scaled_bias(
    bias_up: torch.Tensor, scale: float, scale_tensor: torch.Tensor | None
) -> torch.Tensor:
    """`σ·b_u`, in fp32 or better: a bias is small, its rounding would be on every row."""
    bias_up = bias_up.to(accumulator(bias_up.dtype))
    return bias_up * scale if scale_tensor is None else bias_up * scale_tensor * scale


class BranchNeeds(NamedTuple):
    """Which gradients of the branch are asked for."""

    dz: bool
    up: bool
    scale: bool
    bias_up: bool


class BranchGradients(NamedTuple):
    """Gradients inside the branch: dz [M, width], the others of their parameters' shapes."""

    dz: torch.Tensor | None
    dup: torch.Tensor | None
    dscale: torch.Tensor | None
    dbias_up: torch.Tensor | None


def branch_backward(
    dy: torch.Tensor,
    up: torch.Tensor,
    bias_up: torch.Tensor | None,
    z: torch.Tensor,
    scale: float,
    scale_tensor: torch.Tensor | None,
    activation: str,
    p: float,
    seed: torch.Tensor | None,
    needs: BranchNeeds,
) -> BranchGradients:
    """Back through `σ·(dropout(act(z)) Uᵀ + b_u)`: what every bottleneck shares."""
    dz = dup = dscale = dbias_up = None
    effective = scale if scale_tensor is None else scale_tensor * scale
    h = units(z, activation, p, seed) if needs.up or needs.scale else None
    reads_bias = bias_up is not None and (needs.scale or needs.bias_up)
    summed = column_sum(dy) if reads_bias else None
    if needs.up:
        dup = outer_gradient(dy, h * effective).to(up.dtype)
    if needs.bias_up:
        dbias_up = scaled_bias(summed, scale, scale_tensor).to(bias_up.dtype)
    if needs.dz or needs.scale:
        dh = project(dy, up.to(dy.dtype).t())
        if needs.scale:
            dscale = inner(dh, h)
            if bias_up is not None:
                dscale = dscale + inner(summed, bias_up)
            dscale = (dscale * scale).to(scale_tensor.dtype)
        dh = dh * effective
        dz = ACTIVATIONS[activation].backward(dropped(dh, Dropout(p, seed)) if p else dh, z)
    return BranchGradients(dz, dup, dscale, dbias_up)
