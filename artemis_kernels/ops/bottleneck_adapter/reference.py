"""`y = residual + s·(dropout(act(x Dᵀ + b_d)) Uᵀ + b_u)` as plain PyTorch.

The meaning of `bottleneck_adapter`: Houlsby et al. (arXiv 1902.00751), §2.1, with the dropout on
the bottleneck's units. Any device, any floating dtype, differentiated by autograd.
"""

import torch
from torch.nn import functional

ACTIVATIONS = {
    "identity": lambda z: z,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "silu": functional.silu,
}


def bottleneck_adapter(
    x: torch.Tensor,  # [..., hidden]
    down: torch.Tensor,  # [width, hidden]
    up: torch.Tensor,  # [hidden, width]
    scale: float | torch.Tensor,
    bias_down: torch.Tensor | None = None,  # [width]
    bias_up: torch.Tensor | None = None,  # [hidden]
    residual: torch.Tensor | None = None,  # x's shape
    activation: str = "gelu",
    keep: torch.Tensor | None = None,  # bool [..., width]; True = kept
    keep_scale: float = 1.0,
) -> torch.Tensor:
    """Return `y` of x's shape; `residual` defaults to x."""
    h = ACTIVATIONS[activation](functional.linear(x, down, bias_down))
    h = h if keep is None else torch.where(keep, h * keep_scale, 0)
    return (x if residual is None else residual) + scale * functional.linear(h, up, bias_up)
