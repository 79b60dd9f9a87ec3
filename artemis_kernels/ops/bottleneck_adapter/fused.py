"""`bottleneck_adapter` in Triton: which launches, in which order.

    row_block             forward, and dX with dz and h, in one launch each over blocks of rows
    two_launch            down, then up, as separate launches: few rows, or too wide a bottleneck
    two_launch_one_read   the same, with dz and dU's parts from one read of dY, then dD

But for the last, dD and dU come from one launch, and every parameter's gradient from one sum of its
parts: three launches in all, or four. Where D or U is frozen, the other takes a sum over rows of
its own. z is fp32; the scale multiplies in fp32 at each store.
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
from .weight_gradients import sum_gradients, weight_gradients

ONE_READ = "two_launch_one_read"


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
            x, down, up, start, config=_config(x, up, chip), bias=bias_down, bias_out=bias_up,
            scale=sigma, **hidden.at("forward"),
        )  # fmt: skip
        return y, z
    z, h = shrunk(x, down, chip, bias=bias_down, with_h=True, **hidden.at("forward"))
    return updated(start, h, up, chip, dtype=x.dtype, bias_low=bias_up, scale=sigma), z


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
    joint = strategy != ONE_READ and z.shape[1] > 0  # else no launch sums dY
    if joint and needs_down and (needs_up or needs_scale):
        return _jointly(
            dy, x, down, up, bias_down, bias_up, z, sigma, hidden, strategy, residual_is_x, needs,
            chip,
        )  # fmt: skip
    wants_columns = bias_up is not None and (needs_scale or needs_bias_up)
    dx = ddown = None
    if strategy == "row_block" and needs_x:
        dx, dz, h = row_block(
            dy, up.t(), down.t(), dy if residual_is_x else None, config=_config(dy, up, chip),
            z=z, scale=sigma, with_h=needs_up or needs_scale or wants_columns,
            **hidden.at("backward"),
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
            one_read=True if strategy == ONE_READ else None,
        )  # fmt: skip
        if needs_x:
            residual = dy if residual_is_x else None
            dx = updated(residual, gradients.hidden, down.t(), chip, dtype=dy.dtype, scale=sigma)
    if needs_down:
        ddown = _empty(down, True)
        sum_over_rows(x, gradients.hidden, ddown, chip, scale=sigma)
    small = small_gradients(gradients, sigma, bias_up, needs_scale, needs_bias_down, needs_bias_up)
    return (
        dx,
        ddown,
        gradients.b if needs_up else None,
        small.scale,
        like(small.bias_down, bias_down),
        like(small.bias_up, bias_up),
    )


def _jointly(
    dy, x, down, up, bias_down, bias_up, z, sigma, hidden, strategy, residual_is_x, needs, chip
) -> tuple[torch.Tensor | None, ...]:
    """`backward` where D and U both learn: dX with dz and h, then dD and dU, then their sums."""
    needs_x, _, needs_up, needs_scale, needs_bias_down, needs_bias_up = needs
    residual, dx = dy if residual_is_x else None, None
    if strategy == "row_block" and needs_x:
        dx, dz, h = row_block(
            dy, up.t(), down.t(), residual, config=_config(dy, up, chip), z=z, scale=sigma,
            with_h=True, hidden_dtype=dy.dtype, **hidden.at("backward"),
        )  # fmt: skip
    else:
        dz, h = shrunk(dy, up.t(), chip, z=z, with_h=True, **hidden.at("backward"))
        if needs_x:
            dx = updated(residual, dz, down.t(), chip, dtype=dy.dtype, scale=sigma)
    shape = Shape(x.shape[0], 0, x.shape[1], z.shape[1], x.dtype)
    parts = weight_gradients(
        x, dy, dz, h, config=tuning.config("weight_gradients", shape, chip),
        with_sums=needs_bias_down or bias_up is not None and (needs_scale or needs_bias_up),
    )  # fmt: skip
    ddown, dup = _empty(down, True), _empty(up, needs_up)
    dbias_down, dbias_up = _empty(bias_down, needs_bias_down), _empty(bias_up, needs_bias_up)
    dot = sum_gradients(
        parts, ddown, dup, dbias_down, dbias_up, scale=sigma,
        against=(up, bias_up) if needs_scale else None,
    )  # fmt: skip
    dscale = None if dot is None else sigma.gradient(dot)
    return dx, ddown, dup, dscale, dbias_down, dbias_up


def _empty(parameter: torch.Tensor | None, learns: bool) -> torch.Tensor | None:
    """Where a parameter's gradient is written."""
    if not learns:
        return None
    return torch.empty_like(parameter, memory_format=torch.contiguous_format)


def _config(x: torch.Tensor, up: torch.Tensor, chip: Chip) -> tuning.Config:
    hidden, width = up.shape
    return tuning.config("row_block", Shape(x.shape[0], k=hidden, r=width, dtype=x.dtype), chip)
