"""What plain torch computes in where a pass keeps fp32 in registers: fp32 or better."""

import torch


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """fp32, or `dtype` where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def widened(x: torch.Tensor) -> torch.Tensor:
    """x in that dtype."""
    return x.to(at_least_fp32(x.dtype))
