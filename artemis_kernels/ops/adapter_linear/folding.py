"""What the folded members of a group have in common: F row under row, z and dz side by side."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...core.products import accumulator


def by_kind(strategies: Sequence[str]) -> tuple[list[int], list[int]]:
    """Which members are folded, and which plain."""
    plain = [i for i, strategy in enumerate(strategies) if strategy.startswith("plain")]
    return [i for i in range(len(strategies)) if i not in plain], plain


def widths(members: Sequence[NamedTuple], of: Sequence[int]) -> list[int]:
    """Those of some members."""
    return [members[i].down.shape[0] for i in of]


def folded_biases(members: Sequence[NamedTuple], folded: Sequence[int]) -> torch.Tensor | None:
    """The `c = D bias + b_d` [Σ widths] in fp32 or better, or None where there are none at all."""
    chosen = [members[i] for i in folded]
    found = [folded_bias(member.down, member.bias, member.bias_down) for member in chosen]
    if all(bias is None for bias in found):
        return None
    for place, member in enumerate(chosen):
        if found[place] is None:
            width, wide = member.down.shape[0], accumulator(member.down.dtype)
            found[place] = member.down.new_zeros(width, dtype=wide)
    return found[0] if len(found) == 1 else torch.cat(found)


def folded_bias(
    down: torch.Tensor, bias: torch.Tensor | None, bias_down: torch.Tensor | None
) -> torch.Tensor | None:
    """`c = D bias + b_d` [width] in fp32 or better, or None where both are absent."""
    if bias is None:
        return None if bias_down is None else bias_down.to(accumulator(bias_down.dtype))
    wide = accumulator(torch.promote_types(down.dtype, bias.dtype))
    through = torch.mv(down.to(wide), bias.to(wide))
    return through if bias_down is None else through + bias_down


def rows_of(
    f: torch.Tensor, members: Sequence[NamedTuple], folded: Sequence[int], reached: Sequence[int]
) -> torch.Tensor:
    """Those of F [Σ widths, in] that the reached stand for: all of it, or a copy."""
    if folded == reached:
        return f
    parts = f.split(widths(members, folded))
    return torch.cat([parts[folded.index(i)] for i in reached])
