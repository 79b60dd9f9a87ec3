"""A bottleneck on the output of a frozen linear layer, as plain PyTorch.

`y0 = x Wᵀ + bias`, then `y = y0 + s·(dropout(act(y0 Dᵀ + b_d)) Uᵀ + b_u)`: the meaning of
`adapter_linear`. Any device, any floating dtype, differentiated by autograd.
"""

import torch

from ..bottleneck_adapter.reference import bottleneck_adapter


def adapter_linear(
    x: torch.Tensor,  # [..., in]
    weight: torch.Tensor,  # [out, in]
    down: torch.Tensor,  # [width, out]
    up: torch.Tensor,  # [out, width]
    scale: float | torch.Tensor,
    bias: torch.Tensor | None = None,  # [out]
    bias_down: torch.Tensor | None = None,  # [width]
    bias_up: torch.Tensor | None = None,  # [out]
    activation: str = "gelu",
    keep: torch.Tensor | None = None,  # bool [..., width]; True = kept
    keep_scale: float = 1.0,
) -> torch.Tensor:
    """Return `y` of shape [..., out]."""
    y0 = torch.nn.functional.linear(x, weight, bias)
    return bottleneck_adapter(
        y0, down, up, scale, bias_down, bias_up, None, activation, keep, keep_scale
    )
