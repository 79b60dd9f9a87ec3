"""What `frozen_linear` means, in plain torch; the oracle of its tests."""

import torch

from ..bottleneck_adapter.reference import ACTIVATIONS


def frozen_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    bias_down: torch.Tensor | None,
    scale: float | torch.Tensor,
    activation: str,
    reads_output: bool,
) -> torch.Tensor:
    """x [..., in], weight [out, in], down [r, in or out], up [out, r] -> [..., out]."""
    y = x @ weight.t()
    y = y if bias is None else y + bias
    z = (y if reads_output else x) @ down.t()
    z = z if bias_down is None else z + bias_down
    return y + scale * (ACTIVATIONS[activation](z) @ up.t())
