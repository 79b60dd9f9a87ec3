"""`SharedSeed`: one dropout mask for all modules that read the same tensor."""

from dataclasses import dataclass

import torch

from artemis_kernels import new_seed


@dataclass(eq=False)
class SharedSeed:
    """One dropout seed for all modules that read the same tensor.

    A member that still owes a use of the current seed takes it; any other draws a new one, which
    the rest then owe. So a forward draws once a group; activation checkpointing, which restores the
    generator, draws the same again; and order, exceptions and skipped members do no harm.
    """

    size: int = 0
    #: Bit i is set while member i may still take `seed`.
    pending: int = 0
    seed: torch.Tensor | None = None

    def join(self) -> int:
        """Add a member; return the bit that stands for it."""
        self.size += 1
        return 1 << (self.size - 1)

    def take(self, member: int, device: torch.device) -> torch.Tensor:
        """Return the seed for `member`: one int64 element on `device`."""
        if self.pending & member:
            self.pending &= ~member
        else:
            self.seed = new_seed(device)
            self.pending = ((1 << self.size) - 1) & ~member
        return self.seed

    def take_for_all(self, device: torch.device) -> torch.Tensor:
        """Return a new seed for every member at once; none is owed afterwards."""
        self.seed, self.pending = new_seed(device), 0
        return self.seed

    def __getstate__(self) -> dict:
        """A copy owes nothing; and torch.export in training mode leaves a seed without a value."""
        return self.__dict__ | {"pending": 0, "seed": None}
