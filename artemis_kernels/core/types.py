"""The words the operations share: a factor, a choice of path, and what a call costs."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

#: A factor as the public functions take it: a pair stands for the product of both.
Factor = float | torch.Tensor | tuple[float, torch.Tensor]
IMPLEMENTATIONS = ("triton", "eager", "reference")


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and the fewest bytes a call must move."""

    flops: int
    bytes: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Choice:
    """Which path a call takes, and why: what dispatch follows and `explain` shows."""

    op: str
    impl: str
    strategy: str
    reason: str
    cost: Cost

    def __str__(self) -> str:
        return (
            f"{self.op}: {self.impl} / {self.strategy}, because {self.reason}"
            f" ({self.cost.flops / 1e9:.3g} GFLOP, {self.cost.bytes / 1e6:.3g} MB)"
        )


class Scale(NamedTuple):
    """`σ = number · tensor`: a tensor stays on its device and receives a gradient."""

    number: float
    tensor: torch.Tensor | None

    @classmethod
    def of(cls, scale: Factor) -> "Scale":
        if isinstance(scale, tuple):
            return cls(float(scale[0]), scale[1])
        if isinstance(scale, torch.Tensor):
            return cls(1.0, scale)
        return cls(float(scale), None)

    @property
    def value(self) -> float | torch.Tensor:
        """As one operand."""
        if self.tensor is None:
            return self.number
        return self.tensor if self.number == 1 else self.number * self.tensor


class Unavailable(RuntimeError):
    """This call, a path asked for by name, or a derivative that only the reference has.

    The message says why in one sentence.
    """
