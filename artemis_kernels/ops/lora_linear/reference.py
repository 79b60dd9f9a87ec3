"""`y = x Wᵀ + bias + s·(dropout(x) Aᵀ) Bᵀ` as plain PyTorch: the meaning of `lora_linear`.

Hu et al., LoRA (arXiv 2106.09685), §4.1. Any device, any floating dtype; autograd differentiates.
"""

import torch


def lora_linear(
    x: torch.Tensor,  # [..., in]
    weight: torch.Tensor,  # [out, in]
    lora_a: torch.Tensor,  # [rank, in]
    lora_b: torch.Tensor,  # [out, rank]
    scale: float | torch.Tensor,
    bias: torch.Tensor | None = None,  # [out]
    keep: torch.Tensor | None = None,  # bool, x's shape; True = kept
    keep_scale: float = 1.0,
) -> torch.Tensor:
    """Return `y` of shape [..., out]; `keep` is the dropout mask of x, `keep_scale` its 1/(1-p)."""
    dropped = x if keep is None else torch.where(keep, x * keep_scale, 0)
    y = torch.nn.functional.linear(x, weight, bias)
    return y + scale * (dropped @ lora_a.mT @ lora_b.mT)
