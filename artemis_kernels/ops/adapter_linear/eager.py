"""`adapter_linear` in plain torch calls, forward and hand-written backward: a group of one."""

from typing import NamedTuple

import torch

from ...core.base import Base
from ...core.groups import Common
from .group_eager import backward_over, forward_over


class Bottleneck(NamedTuple):
    """The tensors of `adapter_linear` beside the weight, or what is asked or found of each."""

    down: torch.Tensor  # [width, out]
    up: torch.Tensor  # [out, width]
    bias: torch.Tensor | None
    bias_down: torch.Tensor | None
    bias_up: torch.Tensor | None
    scale_tensor: torch.Tensor | None


def forward(
    x: torch.Tensor,  # [M, in]
    base: Base,  # of [out, in]
    down: torch.Tensor,
    up: torch.Tensor,
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
    member = Bottleneck(down, up, bias, bias_down, bias_up, scale_tensor)
    common = Common((scale,), activation, dropout_p, seed, "eager", (strategy,))
    (y,), (z, kept) = forward_over(lambda _: base, x, [member], common)
    return y, z, kept


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
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of x, down, up, scale_tensor, bias, bias_down and bias_up."""
    needs_x, needs_down, needs_up, needs_scale, *of_biases = needs
    member = Bottleneck(down, up, bias, bias_down, bias_up, scale_tensor)
    common = Common((scale,), activation, dropout_p, seed, "eager", (strategy,))
    dx, (found,) = backward_over(
        lambda _: base, [dy], x, [member], [z, kept], common, needs_x,
        [Bottleneck(needs_down, needs_up, *of_biases, needs_scale)],
    )  # fmt: skip
    return dx, found.down, found.up, found.scale_tensor, *found[2:5]
