"""What the cells say together: a row an arm, the comparisons that were named, the targets.

Works on records alone, so that a committed file can be read without the model or the data.
"""

from collections.abc import Sequence
from typing import Any

import numpy

from .arms import ARMS, COMPARISONS, FAMILIES, TARGETS
from .statistics import Interval, bootstrap, difference, gap_closed, retention, student

Record = dict[str, Any]
#: With fewer, the scatter between seeds is not known, and no verdict is given.
_SEEDS_FOR_A_VERDICT = 3
_NO_VERDICT = f"no verdict below {_SEEDS_FOR_A_VERDICT} seeds"


class Dataset:
    """The cells of one data set under one setting, of the seeds that all its arms have."""

    def __init__(self, name: str, records: Sequence[Record]):
        self.name = name
        by_arm: dict[str, dict[int, Record]] = {}
        for record in records:
            by_arm.setdefault(record["arm"], {})[record["seed"]] = record
        self.seeds = sorted(set.intersection(*(set(cells) for cells in by_arm.values())))
        self.cells = {
            arm: [by_arm[arm][seed] for seed in self.seeds] for arm in ARMS if arm in by_arm
        }
        self.correct = {arm: _correct(cells) for arm, cells in self.cells.items() if cells}

    def rows(self) -> list[Record]:
        """For each arm: accuracy with Student's interval, ratios with the bootstrap's, costs."""
        rows = []
        for arm, cells in self.cells.items():
            if not cells:
                continue
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
                    "seconds": _mean(cells, "seconds"),
                    "choice": choice,
                    "at_the_edge": choice in (min(trials), max(trials)),
                }
            )
        return rows

    def comparisons(self) -> list[Record]:
        """The named differences in accuracy of arms that were both run."""
        return [
            {
                "dataset": self.name,
                "what": f"{ARMS[arm].what}, against {ARMS[other].what}",
                "difference": (found := self._interval(difference, arm, other)).to_dict(),
                "verdict": self._verdict(_against_zero, found),
            }
            for arm, other in COMPARISONS
            if arm in self.correct and other in self.correct
        ]

    def targets(self) -> list[Record]:
        """What the default hybrid should reach, and whether its interval does."""
        if not {"hybrid", "full", "frozen"} <= self.correct.keys():
            return []
        values = {
            "retention": self._interval(retention, "hybrid", "full"),
            "gap": self._interval(gap_closed, "hybrid", "full", "frozen"),
        }
        return [
            {
                "dataset": self.name,
                "what": {"retention": "retention", "gap": "gap closed"}[name],
                "target": TARGETS[name],
                "measured": found.to_dict(),
                "verdict": self._verdict(_against_target, found, TARGETS[name]),
            }
            for name, found in values.items()
        ]

    def _verdict(self, rule, *arguments) -> str:
        return rule(*arguments) if len(self.seeds) >= _SEEDS_FOR_A_VERDICT else _NO_VERDICT

    def _interval(self, statistic, *arms: str) -> Interval:
        return bootstrap([self.correct[arm] for arm in arms], statistic)

    def _ratio(self, statistic, *arms: str) -> Record | None:
        if not set(arms) <= self.correct.keys() or arms[0] in arms[1:]:
            return None
        return self._interval(statistic, *arms).to_dict()


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


def _mean(cells: Sequence[Record], key: str) -> float:
    return float(numpy.mean([cell[key] for cell in cells]))


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
