"""The hidden units of a bottleneck on the eager path: all between its two products, in one pass.

`h = dropout(act(z))·σ`, forward and backward. Each function has two ways, a pass of
`native/units.c` or plain torch; both drop the same units. `biased` gives h one more column, of
ones: a bias of the up-projection then rides as one more column of U, so that neither it nor its
gradient takes a pass over y.
"""

from typing import NamedTuple

import torch

from . import native
from .activations import ACTIVATIONS
from .dropped import Dropout, dropped
from .products import column_sum, inner

KINDS = ("identity", "relu", "silu", "gelu", "gelu_tanh")  # as numbered in native/units.c
_ROWS_OF_A_SUM = 64  # as there


class UnitGradients(NamedTuple):
    """What the backward of the units returns."""

    dz: torch.Tensor  # [M, width], z's dtype
    h: torch.Tensor | None  # as `Units.forward` returned it
    dz_sum: torch.Tensor  # [width], over rows, fp32 or better
    inner: torch.Tensor  # 0-d: Σ dh ⊙ dropout(act(z)), fp32 or better


class Units(NamedTuple):
    """What a bottleneck does between its products."""

    activation: str
    scale: torch.Tensor | None  # σ, one element
    mask: Dropout | None

    def forward(self, z: torch.Tensor, biased: bool) -> torch.Tensor:
        """h [M, width (+ 1)] for z [M, width], in z's dtype."""
        library = native.library_for(z)
        if library is None:
            return self._scaled(self._dropped(z), biased)
        z, (m, w) = _rows(z), z.shape
        h = z.new_empty(m, w + biased)
        getattr(library, f"artemis_units_forward_{native.NAMES[z.dtype]}")(
            z.data_ptr(), z.stride(0), h.data_ptr(), m, w, w + biased, *self.numbers(),
            torch.get_num_threads(),
        )  # fmt: skip
        return h

    def backward(
        self,
        z: torch.Tensor,
        dh: torch.Tensor,
        factor: float,
        biased: bool,
        needs_h: bool,
        dz: torch.Tensor | None = None,
    ) -> UnitGradients:
        """`dz = dh·(factor·σ)·mask·act'(z)` for dh [M, width], in `dz` where it is given."""
        library = native.library_for(z)
        if library is None:
            return self._plain_backward(z, dh, factor, biased, needs_h, dz)
        z, dh, (m, w) = _rows(z), dh.contiguous(), z.shape
        dz = z.new_empty(m, w) if dz is None else dz
        h = z.new_empty(m, w + biased) if needs_h else None
        summed_in = torch.float64 if z.dtype == torch.float32 else torch.float32
        sums = z.new_empty(-(-m // _ROWS_OF_A_SUM), w + 1, dtype=summed_in)
        getattr(library, f"artemis_units_backward_{native.NAMES[z.dtype]}")(
            z.data_ptr(), z.stride(0), dh.data_ptr(), dz.data_ptr(), dz.stride(0),
            None if h is None else h.data_ptr(), sums.data_ptr(), m, w, w + biased, factor,
            *self.numbers(), torch.get_num_threads(),
        )  # fmt: skip
        total = sums.sum(0)
        return UnitGradients(dz, h, total[:w], total[w])

    def _plain_backward(self, z, dh, factor, biased, needs_h, out) -> UnitGradients:
        kept = self._dropped(z)
        scaled = dh * factor if self.scale is None else dh * (self.scale * factor)
        if self.mask is not None:
            scaled = dropped(scaled, self.mask)
        dz = ACTIVATIONS[self.activation].backward(scaled, z)
        h = self._scaled(kept, biased) if needs_h else None
        dz_sum, summed = column_sum(dz), inner(dh, kept)
        return UnitGradients(dz if out is None else out.copy_(dz), h, dz_sum, summed)

    def numbers(self) -> tuple:
        """σ, the activation and the mask for a compiled pass."""
        sigma = 1.0 if self.scale is None else float(self.scale.detach())
        return sigma, KINDS.index(self.activation), *Dropout.arguments(self.mask)

    def _dropped(self, z: torch.Tensor) -> torch.Tensor:
        h = ACTIVATIONS[self.activation].forward(z)
        return h if self.mask is None else dropped(h, self.mask)

    def _scaled(self, h: torch.Tensor, biased: bool) -> torch.Tensor:
        h = h if self.scale is None else h * self.scale
        return torch.cat((h, h.new_ones(h.shape[0], 1)), 1) if biased else h


def _rows(z: torch.Tensor) -> torch.Tensor:
    """z, or a copy of it, whose rows lie in one piece each."""
    return z if z.stride(1) == 1 else z.contiguous()
