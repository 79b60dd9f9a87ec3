"""`SharedSeed`: one dropout mask for all modules that read the same tensor."""

import weakref
from dataclasses import dataclass, field

import torch

from artemis_kernels import new_seed


@dataclass(eq=False)
class SharedSeed:
    """One dropout seed for all modules that read the same tensor.

    A member that still owes a use of the current seed takes it for the tensor that it was drawn
    for; any other draws a new one, which the rest then owe. So a forward draws once a group;
    activation checkpointing, which restores the generator, draws the same again, since nothing of
    an earlier forward has a part in it; and order, exceptions and skipped members do no harm.
    """

    size: int = 0
    #: Bit i is set while member i may still take `seed`.
    pending: int = 0
    seed: torch.Tensor | None = None
    #: The tensor that `seed` was drawn for; a compiled graph, which makes no weak references, keeps
    #: none.
    source: weakref.ref | None = field(default=None, repr=False)

    def join(self) -> int:
        """Add a member; return the bit that stands for it."""
        self.size += 1
        return 1 << (self.size - 1)

    def take(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """Return the seed for `member`, which reads x: one int64 element on its device."""
        compiling = torch.compiler.is_compiling()
        if self.pending & member and (compiling or self._is_for(x)):
            self.pending &= ~member
        else:
            self.seed = new_seed(x.device)
            self.pending = ((1 << self.size) - 1) & ~member
            self.source = None if compiling else weakref.ref(x)
        return self.seed

    def _is_for(self, x: torch.Tensor) -> bool:
        return self.source is not None and self.source() is x

    def take_for_all(self, device: torch.device) -> torch.Tensor:
        """Return a new seed for every member at once; none is owed afterwards."""
        self.seed, self.pending = new_seed(device), 0
        return self.seed

    def __getstate__(self) -> dict:
        """A copy owes nothing; and torch.export in training mode leaves a seed without a value."""
        return self.__dict__ | {"pending": 0, "seed": None, "source": None}
