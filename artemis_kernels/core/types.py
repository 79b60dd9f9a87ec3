"""The words the operations share: a choice of path, and what a call costs."""

from dataclasses import dataclass

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


class Unavailable(RuntimeError):
    """This call, a path asked for by name, or a derivative that only the reference has.

    The message says why in one sentence.
    """
