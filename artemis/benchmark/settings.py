"""What a table is about: one model on one batch by several arms, and the cells that takes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import AdapterError
from .arms import ARMS
from .extrapolation import Estimate, by_layers, described, total, whole
from .memory import total_memory
from .models import LARGE, Cell, architecture
from .records import Record
from .session import Session
from .steps import Step
from .turns import Spread

_SHARE = 0.8  # of the machine's memory that a cell may need


@dataclass(frozen=True)
class Setting:
    """One model on one batch, and by which arms.

    `parts` says that it is extrapolated, `compiled` that every arm runs under `torch.compile`.
    """

    model: str
    batch: int
    sequence: int
    parts: bool
    arms: tuple[str, ...]
    compiled: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    def describe(self, workload: str) -> Record:
        """What a row of a table says of its setting."""
        mode = {"compiled": True} if self.compiled else {}
        return {
            "model": self.model, "tokens": self.tokens, "sequence": self.sequence,
            "batch": self.batch, **mode, "how": described(self.estimate(workload)),
        }  # fmt: skip

    def steps(self, workload: str) -> list[Step]:
        """Every arm on every cell."""
        cells = list(self.estimate(workload))
        return [self.step(workload, arm, cell) for arm in self.arms for cell in cells]

    def step(self, workload: str, arm: str, cell: Cell) -> Step:
        """One of them."""
        return Step(workload, arm, cell, self.compiled)

    def estimate(self, workload: str) -> Estimate:
        """The cells to measure: as the most demanding of all arms allows, chosen now or not."""
        sizes = architecture(self.model)

        def fits(cell: Cell) -> bool:
            needed = max(Step(workload, arm, cell).estimated_bytes for arm in ARMS)
            return needed < _SHARE * total_memory()

        if self.parts:
            return by_layers(self.model, sizes, self.batch, self.sequence, fits)
        return whole(
            Cell(self.model, sizes.layers, sizes.vocabulary, self.batch, self.sequence, whole=True)
        )


def settings(
    models: Iterable[str],
    token_counts: Iterable[int],
    sequence: int,
    arms: Sequence[str],
    measure: str = "auto",
    compiled: bool = False,
) -> list[Setting]:
    """Every model with every number of tokens.

    `measure` is "whole", "parts", or "auto": parts of the named large models.

    Raises:
        AdapterError: an unknown model, or tokens that do not fill whole sequences.
    """
    found = []
    for model in models:
        layers = architecture(model).layers
        parts = measure == "parts" or measure == "auto" and model in LARGE
        if parts and layers < 2:
            raise AdapterError(f"--measure: got parts for {model!r}, allowed: from 2 layers")
        for tokens in token_counts:
            if tokens < sequence or tokens % sequence:
                raise AdapterError(f"--tokens: got {tokens}, allowed: multiples of {sequence}")
            batch = tokens // sequence
            found.append(Setting(model, batch, sequence, parts, tuple(arms), compiled))
    return found


def checked_among(steps: Iterable[Step]) -> list[Step]:
    """The steps that go through the gate: of each adapter arm that with the fewest layers."""
    first: dict[str, Step] = {}
    for step in steps:
        if ARMS[step.arm].is_full or not step.cell.layers:
            continue
        known = first.get(step.arm)
        if known is None or step.cell.layers < known.cell.layers:
            first[step.arm] = step
    return list(first.values())


def time_of(session: Session, setting: Setting, arm: str, workload: str) -> Record:
    """`ms` of the whole model and the verdict of the gate, or `failed`: why there is no time."""
    estimate = setting.estimate(workload)
    steps = {cell: setting.step(workload, arm, cell) for cell in estimate}
    failed = [reason for step in steps.values() if (reason := session.failed(step))]
    gates = [gate for step in steps.values() if (gate := session.value(step, "gate"))]
    found: Record = {"gate": gates[0]} if gates else {}
    if failed:
        return found | {"failed": failed[0]}
    spreads = {cell: session.spread(step) for cell, step in steps.items()}
    if None in spreads.values():
        return found | {"failed": "does not fit into memory"}
    return found | {"ms": extrapolated(estimate, spreads)}


def extrapolated(estimate: Estimate, spreads: dict[Cell, Spread]) -> dict[str, float]:
    """Median of the whole, and its range when every cell errs towards one side by its own range."""
    middle = total(estimate, {cell: spread.p50 for cell, spread in spreads.items()})
    low, high = middle, middle
    for cell, coefficient in estimate.items():
        p50, *ends = spreads[cell]
        changes = sorted(coefficient * (end - p50) for end in ends)
        low, high = low + changes[0], high + changes[1]
    return {"p50": round(middle, 2), "p20": round(low, 2), "p80": round(high, 2)}
