"""What `cross_entropy` means, in plain torch; the oracle of its tests."""

import torch
from torch.nn import functional


def cross_entropy(logits: torch.Tensor, target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """logits [M, classes], target [M] -> losses [M], fp32 or better; 0 where ignored."""
    logits = logits.masked_fill((target == ignore_index)[:, None], 0)  # whose 0 · inf would be nan
    at_least = torch.promote_types(logits.dtype, torch.float32)
    return functional.cross_entropy(
        logits.to(at_least), target, ignore_index=ignore_index, reduction="none"
    )
