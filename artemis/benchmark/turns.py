"""Timing several providers side by side: rounds in which all take turns, and their spread."""

import gc
import random
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import NamedTuple, TypeVar

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
