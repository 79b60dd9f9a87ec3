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
        z, (m, w) = z.contiguous(), z.shape
        h = z.new_empty(m, w + biased)
        getattr(library, f"artemis_units_forward_{native.NAMES[z.dtype]}")(
            z.data_ptr(), h.data_ptr(), m, w, w + biased, self._factor(),
            KINDS.index(self.activation), *Dropout.arguments(self.mask), torch.get_num_threads(),
        )  # fmt: skip
        return h

    def backward(
        self, z: torch.Tensor, dh: torch.Tensor, factor: float, biased: bool, needs_h: bool
    ) -> UnitGradients:
        """`dz = dh·(factor·σ)·mask·act'(z)` for dh [M, width], which it may overwrite."""
        library = native.library_for(z)
        if library is None:
            kept = self._dropped(z)
            scaled = dh * factor if self.scale is None else dh * (self.scale * factor)
            if self.mask is not None:
                scaled = dropped(scaled, self.mask)
            dz = ACTIVATIONS[self.activation].backward(scaled, z)
            h = self._scaled(kept, biased) if needs_h else None
            return UnitGradients(dz, h, column_sum(dz), inner(dh, kept))
        z, dz, (m, w) = z.contiguous(), dh.contiguous(), z.shape
        h = z.new_empty(m, w + biased) if needs_h else None
        summed_in = torch.float64 if z.dtype == torch.float32 else torch.float32
        sums = z.new_empty(-(-m // _ROWS_OF_A_SUM), w + 1, dtype=summed_in)
        getattr(library, f"artemis_units_backward_{native.NAMES[z.dtype]}")(
            z.data_ptr(), dz.data_ptr(), h.data_ptr() if needs_h else None, sums.data_ptr(),
            m, w, w + biased, self._factor(), factor,
            KINDS.index(self.activation), *Dropout.arguments(self.mask), torch.get_num_threads(),
        )  # fmt: skip
        total = sums.sum(0)
        return UnitGradients(dz, h, total[:w], total[w])

    def _factor(self) -> float:
        return 1.0 if self.scale is None else float(self.scale.detach())

    def _dropped(self, z: torch.Tensor) -> torch.Tensor:
        h = ACTIVATIONS[self.activation].forward(z)
        return h if self.mask is None else dropped(h, self.mask)

    def _scaled(self, h: torch.Tensor, biased: bool) -> torch.Tensor:
        h = h if self.scale is None else h * self.scale
        return torch.cat((h, h.new_ones(h.shape[0], 1)), 1) if biased else h
