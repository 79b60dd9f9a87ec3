"""`bottleneck_adapter` in Triton: which launches, in which order.

    row_block    forward, and dX with dz, in one launch each over blocks of rows
    two_launch   down, then up, as separate launches: for few rows, or too wide a bottleneck

Weight gradients are sums over rows of their own in both. z is fp32; the scale multiplies in fp32
at each store.
"""

import torch

from ...core import device, tuning
from ...core.device import Chip
from ...core.tiling import Shape
from ..low_rank.arguments import Dropout, Scale
from ..low_rank.steps import (
    ExpandGradients,
    Hidden,
    expand_gradients,
    like,
    product_gradients,
    shrunk,
    small_gradients,
    sum_over_rows,
    updated,
)
from .kernels import row_block


@device.launches_on_first_argument
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
    """Return y [M, hidden] in x's dtype and z [M, width] in fp32."""
    chip = device.chip(x.device)
    start = x if residual is None else residual
    sigma, hidden = Scale(scale, scale_tensor), Hidden(activation, Dropout(dropout_p, seed))
    if strategy == "row_block":
        y, z, _ = row_block(
            x, down, up, start, config=_config(x, up, chip), stage="forward",
            bias=bias_down, bias_out=bias_up, scale=sigma, **hidden._asdict(),
        )  # fmt: skip
        return y, z
    z, h = shrunk(x, down, chip, stage="forward", bias=bias_down, with_h=True, **hidden._asdict())
    return updated(start, h, up, chip, dtype=x.dtype, bias_low=bias_up, scale=sigma), z


@device.launches_on_first_argument
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
    chip = device.chip(dy.device)
    sigma, hidden = Scale(scale, scale_tensor), Hidden(activation, Dropout(dropout_p, seed))
    wants_columns = bias_up is not None and (needs_scale or needs_bias_up)
    dx = ddown = None
    if strategy == "row_block" and needs_x:
        dx, dz, h = row_block(
            dy, up.t(), down.t(), dy if residual_is_x else None, config=_config(dy, up, chip),
            stage="backward", z=z, scale=sigma, with_h=needs_up or needs_scale or wants_columns,
            **hidden._asdict(),
        )  # fmt: skip
        gradients = ExpandGradients(dz, None, None, None)
        if h is not None:
            gradients = product_gradients(dy, h, up, chip, sigma, needs_scale, wants_columns)
            gradients = gradients._replace(hidden=dz)
    else:
        gradients = expand_gradients(
            dy, up, z, chip, hidden=hidden, scale=sigma,
            wants_hidden=needs_x or needs_down or needs_bias_down,
            wants_b=needs_up, wants_dot=needs_scale, wants_columns=wants_columns,
        )  # fmt: skip
        if needs_x:
            residual = dy if residual_is_x else None
            dx = updated(residual, gradients.hidden, down.t(), chip, dtype=dy.dtype, scale=sigma)
    if needs_down:
        ddown = torch.empty_like(down, memory_format=torch.contiguous_format)
        sum_over_rows(x, gradients.hidden, ddown, chip, scale=sigma)
    small = small_gradients(gradients, sigma, bias_up, needs_scale, needs_bias_down, needs_bias_up)
    return (
        dx,
        ddown,
        gradients.b if needs_up else None,
        like(small.scale, scale_tensor),
        like(small.bias_down, bias_down),
        like(small.bias_up, bias_up),
    )


def _config(x: torch.Tensor, up: torch.Tensor, chip: Chip) -> tuning.Config:
    hidden, width = up.shape
    return tuning.config("row_block", Shape(x.shape[0], k=hidden, r=width, dtype=x.dtype), chip)
