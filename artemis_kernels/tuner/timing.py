"""Times of alternatives that take turns, past the cache, and the rule by which one wins."""

import random
import time
from collections.abc import Callable, Hashable

import torch

MARGIN = 1.05  # a winner's median beats the usual choice's by more
FLUSHED = 1 << 28  # bytes written before a timed call on a GPU: past its cache
# Writes of them: 2 to 10 ms, in which the host enqueues a forward and backward of 20 launches. A
# call is timed as in training, where the host is ahead, not by how fast Python launches.
HEAD_START = 64

Run = Callable[[int], object]  # takes the number of its turn, for operands that rotate


def in_turns(runs: dict[Hashable, Run], rounds: int, device: torch.device) -> dict:
    """`{name: [20th percentile, median, 80th]}` in milliseconds; a first round warms up."""
    elapsed = _on_gpu(device) if device.type == "cuda" else _on_cpu
    names, times, turn = list(runs), {name: [] for name in runs}, 0
    shuffle = random.Random(0).shuffle
    for number in range(rounds + 1):
        shuffle(names)
        for name in names:
            ms = elapsed(runs[name], turn)
            turn += 1
            if number:
                times[name].append(ms)
    return {name: percentiles(values) for name, values in times.items()}


def _on_cpu(run: Run, turn: int) -> float:
    start = time.perf_counter()
    run(turn)
    return (time.perf_counter() - start) * 1e3


def _on_gpu(device: torch.device) -> Callable[[Run, int], float]:
    flushed = torch.empty(FLUSHED, dtype=torch.uint8, device=device)

    def elapsed(run: Run, turn: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(HEAD_START):
            flushed.zero_()
        start.record()
        run(turn)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return elapsed


def percentiles(values: list[float]) -> list[float]:
    """The 20th percentile, median and 80th, linear between values."""
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return [round(value, 5) for value in torch.quantile(ordered, points).tolist()]


def winner(times: dict[Hashable, list[float]], usual: Hashable) -> Hashable:
    """The fastest by its median, or `usual` unless that is beaten beyond doubt.

    Beyond doubt: by more than 5 % in the median, and with an 80th percentile below the 20th of
    `usual`.
    """
    best = min(times, key=lambda name: times[name][1])
    (_, median, slow), (usual_fast, usual_median, _) = times[best], times[usual]
    return best if median * MARGIN < usual_median and slow < usual_fast else usual
