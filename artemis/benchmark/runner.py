"""Timing several providers side by side, and what is kept of it."""

import gc
import json
import os
import random
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy
import torch
from tqdm import tqdm

Provider = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


class Spread(NamedTuple):
    """Median and the 20th and 80th percentile."""

    p50: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        p20, p50, p80 = numpy.percentile(values, (20, 50, 80))
        return cls(float(p50), float(p20), float(p80))

    def to_dict(self, digits: int = 4) -> dict[str, float]:
        return {name: round(value, digits) for name, value in self._asdict().items()}


def interleaved(
    providers: Mapping[str, Provider], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Milliseconds of each provider in each round."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    turns = in_turns(providers, warmup + rounds)
    total = len(providers) * (warmup + rounds)
    for number, name, milliseconds in tqdm(turns, "turns", total, disable=None, leave=False):
        if number >= warmup:
            times[name].append(milliseconds)
    return times


def in_turns(
    providers: Mapping[Name, Provider],
    rounds: int,
    milliseconds: Callable[[Provider], float] | None = None,
) -> Iterator[tuple[int, Name, float]]:
    """`(round, provider, milliseconds)` as they come; by the clock unless `milliseconds` is given.

    A round runs every provider once, in an order of its own, so that a drift of the clock or a
    neighbour's burst meets all of them and nobody always follows the same one.
    """
    measure, order = milliseconds or _by_the_clock, list(providers)
    shuffle = random.Random(0).shuffle
    for number in range(rounds):
        shuffle(order)
        for name in order:
            yield number, name, measure(providers[name])


def _by_the_clock(provider: Provider) -> float:
    """Milliseconds of a long call, garbage collected before it and a GPU's queue run empty."""
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    provider()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    gc.enable()
    return elapsed * 1e3


def best(function: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the fastest of several calls, the first not counted: for peaks and trials."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def append(path: Path, records: list[dict[str, Any]]) -> None:
    """Add records to a file of JSON lines, which is made, and half a last line of it ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if _ends_within_a_line(path):
        lines = "\n" + lines
    with path.open("a", encoding="utf-8") as file:
        file.write(lines)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; a line that was cut short is none.

    A full disk, or a process that is killed, leaves half a record.
    """
    found = map(_record, path.read_text(encoding="utf-8").splitlines())
    return [record for record in found if record is not None]


def _ends_within_a_line(path: Path) -> bool:
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _record(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None
