"""What `quantized_linear` means, in plain torch; the oracle of its tests."""

import torch


def quantized_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [..., in], weight [out, in], dequantized, bias [out] or None -> [..., out]."""
    y = x @ weight.t()
    return y if bias is None else y + bias
