"""Sums over batches of one target's gradient: all that a score is made of."""

from dataclasses import dataclass, field

import torch

#: Of a larger gradient this many rows and columns are kept, drawn once.
SIDE = 1024


@dataclass(eq=False)
class Moments:
    """Sums of G = dYᵀ u [outputs, inputs] over batches, fp32, where u is what the target reads.

    Of more than `SIDE` rows or columns only `SIDE` are kept, the same in every batch; `share` is
    how many entries each kept one stands for.
    """

    outputs: int
    inputs: int
    device: torch.device
    batches: int = 0
    rows: torch.Tensor | None = field(init=False, repr=False)
    columns: torch.Tensor | None = field(init=False, repr=False)
    total: torch.Tensor = field(init=False, repr=False)
    squares: torch.Tensor = field(init=False, repr=False)
    #: This batch's gradient so far, and how many calls of the target have yet to bring theirs.
    _current: torch.Tensor | None = field(default=None, repr=False)
    _calls: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        self.rows = _drawn(self.outputs, self.device)
        self.columns = _drawn(self.inputs, self.device)
        shape = min(self.outputs, SIDE), min(self.inputs, SIDE)
        self.total = torch.zeros(shape, device=self.device)
        self.squares = torch.zeros(shape, device=self.device)

    @property
    def share(self) -> float:
        """Entries of the gradient over entries kept."""
        return self.outputs * self.inputs / self.total.numel()

    @property
    def mean(self) -> torch.Tensor:
        """The mean gradient."""
        return self.total / self.batches

    @property
    def variance(self) -> torch.Tensor:
        """The variance of each entry between batches; needs two of them."""
        n = self.batches
        return ((self.squares - n * self.mean.square()) / (n - 1)).clamp_(min=0)

    def kept(self, matrix: torch.Tensor) -> torch.Tensor:
        """The entries of an [outputs, inputs] matrix that are kept."""
        matrix = matrix if self.rows is None else matrix[self.rows]
        return matrix if self.columns is None else matrix[:, self.columns]

    def expect(self) -> None:
        """The target was called: a gradient should follow."""
        self._calls += 1

    def add(self, u: torch.Tensor, dy: torch.Tensor) -> None:
        """Take in the gradient of one call: u [..., inputs], dy [..., outputs]."""
        u, dy = u.flatten(0, -2), dy.flatten(0, -2)
        u = u if self.columns is None else u[:, self.columns]
        dy = dy if self.rows is None else dy[:, self.rows]
        product = dy.float().t() @ u.float()
        self._current = product if self._current is None else self._current + product
        self._calls -= 1
        if self._calls == 0:  # so that only one target's is held at a time
            self._fold()

    def end_batch(self) -> None:
        """Close the batch; calls that had no part in the loss have brought nothing."""
        self._fold()
        self._calls = 0
        self.batches += 1

    def _fold(self) -> None:
        if self._current is not None:
            self.total += self._current
            self.squares.addcmul_(self._current, self._current)
            self._current = None


def _drawn(size: int, device: torch.device) -> torch.Tensor | None:
    """Indices of `SIDE` of `size` rows, or None where all are kept."""
    if size <= SIDE:
        return None
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    return order[:SIDE].sort().values.to(device)
