"""What launchers pass beside tensors: the scale, the dropout, and how both reach a kernel."""

import functools
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

    def gradient(self, dot: torch.Tensor) -> torch.Tensor:
        """That of the tensor, in its dtype, from that of the whole scale."""
        return (dot if self.number == 1 else dot * self.number).to(self.tensor.dtype)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """`x` scaled, in float32: for the small tensors that torch handles."""
        x = x.float() * self.number
        return x if self.tensor is None else x * self.tensor.float()


class Dropout(NamedTuple):
    """Drop with probability `p` by the mask of `seed`, int64 [1] on the device; 0 drops nothing."""

    p: float = 0.0
    seed: torch.Tensor | None = None

    def arguments(self, rows: int, *columns: int) -> tuple[torch.Tensor | None, int, float, bool]:
        """A kernel's seed_ptr, threshold, rescale and PAIRED for the mask of a [rows, columns].

        No seed, no dropout. Several `columns` are those of tensors side by side.
        """
        if not self.p:
            return None, 0, 1.0, True
        paired = all([n % 2 == 0 and rows * n <= _PAIRED_ELEMENTS for n in columns])
        return self.seed, *_numbers(self.p), paired


@functools.cache
def _numbers(p: float) -> tuple[int, float]:
    """Threshold and rescale."""
    return rng.threshold(p), rng.keep_scale(p)


def strides(x: torch.Tensor | None) -> tuple[int, int]:
    """Those of a matrix that may be absent."""
    return (0, 0) if x is None else x.stride()


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """A vector that may be absent, as kernels read it: without a stride."""
    return None if x is None else x.contiguous()


NO_DROPOUT = Dropout()
UNSCALED = Scale()
