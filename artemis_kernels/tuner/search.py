"""Search for strategies: time what a table lacks, keep what wins, write after every case."""

import time
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

from ..core import tables
from ..core.device import Chip, has_triton
from ..core.strategies import Case, candidates
from . import timing
from .workload import Workload

Times = dict[Hashable, list[float]]
#: Times the named strategies of a case; the first is the usual one.
Measure = Callable[[Case, tuple[str, ...]], Times]


def of_calls(
    calls: Iterable[Sequence[Case]], path: Path, chip: Chip | None, device: torch.device, *,
    rounds: int, progress: bool,
) -> dict[str, dict]:  # fmt: skip
    """Entries of the strategies of every case of `calls`, in the table at `path` too."""
    cases = tuple(dict.fromkeys(case for members in calls for case in members))
    real = Measured(device, rounds)
    return strategies(
        cases, path, chip, usual=real.usual, measure=real.measure, rounds=rounds, progress=progress
    )


def strategies(
    cases: Collection[Case],
    path: Path,
    chip: Chip | None,
    *,
    usual: Callable[[Case], str],
    measure: Measure,
    rounds: int,
    progress: bool,
) -> dict[str, dict]:
    """Entries of `cases` by key, in the table at `path` too; those it held are not timed again.

    A case of one strategy leaves nothing to choose and no entry.
    """
    found = tables.read(path, chip)
    missing = [case for case in cases if case.key not in found["strategies"]]
    for case in tqdm(missing, "strategies", disable=None if progress else True):
        names = candidates(case, chip)
        if len(names) < 2:
            continue
        first = usual(case)
        times = measure(case, (first, *(name for name in names if name != first)))
        chosen = timing.winner(times, first)
        found["strategies"][case.key] = entry(chosen, first, times, rounds)
        tables.write(path, found)
    asked = {case.key for case in cases}
    return {key: one for key, one in found["strategies"].items() if key in asked}


def entry(chosen, usual, times: Times, rounds: int) -> dict:
    """What a table keeps of a measurement."""
    return {
        "chosen": chosen,
        "usual": usual,
        "ms": times,
        "rounds": rounds,
        "torch": torch.__version__,
        "triton": metadata.version("triton") if has_triton() else None,
        "date": time.strftime("%Y-%m-%d"),
    }


class Measured:
    """The real `usual` and `measure` on a device: the operands of one case at a time."""

    def __init__(self, device: torch.device, rounds: int):
        self.device, self.rounds = device, rounds
        self._workload: Workload | None = None

    def usual(self, case: Case) -> str:
        return self._of(case).usual()

    def measure(self, case: Case, names: tuple[str, ...]) -> Times:
        workload = self._of(case)
        runs = {
            name: lambda turn, name=name: workload.run(name, turn) for name in names
        }  # fmt: skip
        return timing.in_turns(runs, self.rounds, self.device)

    def _of(self, case: Case) -> Workload:
        if self._workload is None or self._workload.case != case:
            self._workload = None  # free the last one's memory first
            self._workload = Workload(case, self.device)
        return self._workload
