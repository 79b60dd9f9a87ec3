"""`quantized_linear` in Triton: the packed product with an empty low-rank term; the vendor's
over a tensor."""

import torch

from ...core import device
from ..packed.steps import Packed, product


def forward(
    x: torch.Tensor, weight: torch.Tensor | Packed, bias: torch.Tensor | None
) -> torch.Tensor:
    """`x Wᵀ + bias` [M, out] for x [M, in], in x's dtype."""
    return product(x, weight, bias, device.chip(x.device))


def input_gradient(dy: torch.Tensor, weight: torch.Tensor | Packed) -> torch.Tensor:
    """`dY W` [M, in] for dY [M, out], in dY's dtype."""
    return product(dy, weight.t(), None, device.chip(dy.device))
