"""x rounded to 8 bits once, for all products of an eager group that want it so."""

from collections.abc import Sequence

import torch

from ..core.eight_bit_rows import Rounded, round_rows


def rounded_for_int8(x: torch.Tensor, strategies: Sequence[str]) -> Rounded | None:
    """`round_rows(x)` where a strategy multiplies int8 by int8, else None."""
    if any(strategy.endswith("_int8") for strategy in strategies):
        return round_rows(x, None)
    return None
