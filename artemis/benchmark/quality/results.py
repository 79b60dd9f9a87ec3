"""What the cells say together: a row an arm, the comparisons that were named, the targets.

Works on records alone, so that a committed file can be read without the model or the data.
"""

from collections.abc import Sequence
from typing import Any

import numpy

from ..records import Record
from .arms import ARMS, COMPARISONS, FAMILIES, TARGETS
from .statistics import Interval, bootstrap, difference, gap_closed, retention, student

#: With fewer, the scatter between seeds is not known, and no verdict is given.
_SEEDS_FOR_A_VERDICT = 3
_NO_VERDICT = f"no verdict below {_SEEDS_FOR_A_VERDICT} seeds"
_RATIOS = {
    "retention": (retention, ("hybrid", "full"), "retention"),
    "gap": (gap_closed, ("hybrid", "full", "frozen"), "gap closed"),
}


class Dataset:
    """The cells of one data set under one setting; what is compared uses the seeds in common."""

    def __init__(self, name: str, records: Sequence[Record]):
        self.name = name
        by_arm: dict[str, dict[int, Record]] = {}
        for record in records:
            by_arm.setdefault(record["arm"], {})[record["seed"]] = record
        #: Arm -> seed -> cell.
        self.cells = {arm: dict(sorted(by_arm[arm].items())) for arm in ARMS if arm in by_arm}

    def rows(self) -> list[Record]:
        """For each arm: accuracy with Student's interval, ratios with the bootstrap's, costs."""
        rows = []
        for arm, by_seed in self.cells.items():
            cells = list(by_seed.values())
            choice, trials = cells[0]["choice"], FAMILIES[ARMS[arm].family].trials
            rows.append(
                {
                    "dataset": self.name,
                    "arm": arm,
                    "what": ARMS[arm].what,
                    "seeds": len(cells),
                    "items": cells[0]["items"],
                    "accuracy": student([cell["accuracy"] for cell in cells]).to_dict(),
                    "retention": self._ratio(retention, arm, "full"),
                    "gap": self._ratio(gap_closed, arm, "full", "frozen"),
                    "trained_parameters": round(_mean(cells, "trained_parameters")),
                    "peak_memory": _mean(cells, "peak_memory"),
                    "seconds": _mean(cells, "seconds"),
                    "choice": choice,
                    "at_the_edge": choice in (min(trials), max(trials)),
                }
            )
        return rows

    def comparisons(self) -> list[Record]:
        """The named differences in accuracy of arms that were both run."""
        rows = []
        for arms in COMPARISONS:
            found = self._interval(difference, *arms)
            if found is not None:
                what = ", against ".join(ARMS[arm].what for arm in arms)
                verdict = self._verdict(arms, _against_zero(found))
                rows.append(self._row(what, arms, difference=found.to_dict(), verdict=verdict))
        return rows

    def targets(self) -> list[Record]:
        """What the default hybrid should reach, and whether its interval does."""
        rows = []
        for name, (statistic, arms, what) in _RATIOS.items():
            found = self._interval(statistic, *arms)
            if found is not None:
                target = TARGETS[name]
                verdict = self._verdict(arms, _against_target(found, target))
                measured = found.to_dict()
                rows.append(
                    self._row(what, arms, measured=measured, target=target, verdict=verdict)
                )
        return rows

    def _row(self, what: str, arms: Sequence[str], **values: Any) -> Record:
        return {"dataset": self.name, "what": what, "seeds": len(self._seeds(arms)), **values}

    def _verdict(self, arms: Sequence[str], verdict: str) -> str:
        return verdict if len(self._seeds(arms)) >= _SEEDS_FOR_A_VERDICT else _NO_VERDICT

    def _seeds(self, arms: Sequence[str]) -> list[int]:
        """Those that all of `arms` have."""
        return sorted(set.intersection(*(set(self.cells.get(arm, ())) for arm in arms)))

    def _interval(self, statistic, *arms: str) -> Interval | None:
        seeds = self._seeds(arms)
        if not seeds or len(set(arms)) < len(arms):
            return None
        return bootstrap([_correct([self.cells[a][s] for s in seeds]) for a in arms], statistic)

    def _ratio(self, statistic, *arms: str) -> Record | None:
        found = self._interval(statistic, *arms)
        return None if found is None else found.to_dict()


def datasets(cells: Sequence[Record]) -> list[Dataset]:
    """The data sets of the records of cells that share one setting."""
    names = dict.fromkeys(cell["dataset"] for cell in cells)
    return [Dataset(name, [cell for cell in cells if cell["dataset"] == name]) for name in names]


def _correct(cells: Sequence[Record]) -> numpy.ndarray:
    """Whether an arm was right: bool [seeds, items]."""
    right = numpy.ones((len(cells), cells[0]["items"]), bool)
    for row, cell in zip(right, cells, strict=True):
        row[cell["wrong"]] = False
    return right


def _mean(cells: Sequence[Record], key: str) -> float | None:
    """Over the cells that have it, since a file may hold older ones; None where none does."""
    known = [cell[key] for cell in cells if key in cell]
    return float(numpy.mean(known)) if known else None


def _against_zero(found: Interval) -> str:
    if found.low > 0:
        return "better"
    return "worse" if found.high < 0 else "not told apart"


def _against_target(found: Interval, target: float) -> str:
    if found.low >= target:
        return "met"
    if found.high < target:
        return "missed"
    return "above it, within the interval" if found.value >= target else "below it, within"
