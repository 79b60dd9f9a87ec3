"""A low-rank term as the compiled products take it (`native/tile.h`), added in their own pass."""

from typing import NamedTuple

import torch

from . import native
from .native import address
from .products import LowRank

MOST_RANKS = 24  # beyond, a product of its own is faster


class Expanded(NamedTuple):
    """What a call reads of a term, held while it runs; nothing for None."""

    s: torch.Tensor | None
    g: torch.Tensor | None
    alpha: float

    @classmethod
    def of(cls, term: LowRank | None, dtype: torch.dtype) -> "Expanded":
        """Of a term with at most `MOST_RANKS`, or None, for a product in `dtype`."""
        if term is None:
            return cls(None, None, 1.0)
        s, g = term.s.to(dtype), term.g
        s = s if s.stride(1) == 1 else s.contiguous()
        return cls(s, g if g.dtype in native.NAMES else g.float(), term.alpha)

    @property
    def arguments(self) -> tuple[int | float | None, ...]:
        """`s, its pitch, g, its strides, whether g is in bf16, rank, alpha`."""
        if self.s is None:
            return None, 0, None, 0, 0, 0, 0, 1.0
        s, g = self.s, self.g
        in_bf16 = g.dtype == torch.bfloat16
        return address(s), s.stride(0), address(g), *g.stride(), in_bf16, s.shape[1], self.alpha


def fitting(term: LowRank | None) -> LowRank | None:
    """The term where its product is to be part of another's pass."""
    return term if term is not None and term.rank <= MOST_RANKS else None
