"""What launchers pass beside tensors: the scale, the dropout, and how both reach a kernel."""

from typing import NamedTuple

import torch

from ...core import rng

_PAIRED_ELEMENTS = 1 << 33


class Scale(NamedTuple):
    """`number · tensor`: a float times an optional 0-d tensor, which is read on the device only."""

    number: float = 1.0
    tensor: torch.Tensor | None = None

    def times(self, factor: float) -> "Scale":
        return Scale(self.number * factor, self.tensor)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """`x` scaled, in float32: for the small tensors that torch handles."""
        x = x.float() * self.number
        return x if self.tensor is None else x * self.tensor.float()


class Dropout(NamedTuple):
    """Drop with probability `p` by the mask of `seed`, int64 [1] on the device; 0 drops nothing."""

    p: float = 0.0
    seed: torch.Tensor | None = None

    @property
    def rescale(self) -> float:
        return rng.keep_scale(self.p) if self.p else 1.0

    def arguments(self, rows: int, *columns: int) -> dict:
        """Kernel arguments for the mask of a [rows, columns] tensor; no seed, no dropout.

        Several `columns` are those of tensors side by side.
        """
        return {
            "seed_ptr": self.seed if self.p else None,
            "threshold": rng.threshold(self.p),
            "rescale": self.rescale,
            "PAIRED": all(n % 2 == 0 and rows * n <= _PAIRED_ELEMENTS for n in columns),
        }


def scale_arguments(scale: Scale | None) -> dict:
    """Kernel arguments of a scale that may be absent: then nothing is multiplied."""
    if scale is None:
        return {"scale": None, "scale_ptr": None}
    return {"scale": scale.number, "scale_ptr": scale.tensor}


NO_DROPOUT = Dropout()
UNSCALED = Scale()
