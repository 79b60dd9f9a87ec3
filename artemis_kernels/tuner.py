"""`tune`: time the strategies of an operation on this CPU and keep what wins."""

import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from .core import cpu_tables
from .core.cpu_tables import Case
from .core.tiling import next_power_of_2
from .ops.adapter_linear.op import adapter_linear, fold_or_plain

MARGIN = 1.05  # a choice is kept where it beats the heuristic's by more
_PAST_THE_CACHE = 1 << 27  # bytes of weights to go round
_MOST_WEIGHTS = 16

Timer = Callable[[Case, int], dict[str, float]]


def tune(
    shapes: Iterable[tuple[int, int, int]],
    rows: Iterable[int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    trains: bool = True,
    rounds: int = 7,
    table: str | Path | None = None,
    progress: bool = True,
) -> dict[str, dict]:
    """Time `adapter_linear` folded and plain on this CPU; later calls take what won by over 5 %.

    The table is written after every case, and what it holds is not timed again: an interrupted run
    goes on where it stopped.

    Args:
        shapes: `(in, out, width)` of the layers.
        rows: numbers of rows; each stands for all down to half its power of two.
        dtype: of x and the weight; the adapter is float32.
        trains: time forward and backward, else the forward under `no_grad`.
        rounds: timed rounds, in which both strategies take turns.
        table: folder to write in; None is the user's, which dispatch reads.
        progress: whether to show a bar on a terminal.

    Returns:
        `{"measured": {key: {strategy: milliseconds}}, "choices": {key: strategy}}`.

    Raises:
        ValueError: sizes or rounds below 1; a table that is malformed.
    """
    shapes, rows = tuple(map(tuple, shapes)), tuple(rows)
    for size in (*rows, rounds, *(size for shape in shapes for size in shape)):
        if size < 1:
            raise ValueError(f"tune: sizes, rows and rounds must be at least 1, got {size}")
    name = str(dtype).removeprefix("torch.")
    cases = dict.fromkeys(
        Case("adapter_linear", next_power_of_2(m), *shape, name, trains)
        for shape in shapes
        for m in rows
    )
    folder = cpu_tables.USER_TABLES if table is None else Path(table)
    return search(tuple(cases), cpu_tables.path_of(folder), rounds, progress, milliseconds)


def search(
    cases: tuple[Case, ...], path: Path, rounds: int, progress: bool, timer: Timer
) -> dict[str, dict]:
    """Time each case that the table at `path` lacks, and write the table after each."""
    found = cpu_tables.read(path)
    missing = [case for case in cases if case.key not in found["measured"]]
    for case in tqdm(missing, "tune", disable=None if progress else True):
        times = timer(case, rounds)
        found["measured"][case.key] = times
        usual = fold_or_plain(*case[1:5], case.trains)[0]
        best = min(sorted(times), key=times.__getitem__)
        if times[usual] > MARGIN * times[best]:
            found["choices"][case.key] = best
        cpu_tables.write(path, found)
    cpu_tables.reload()
    return found


def milliseconds(case: Case, rounds: int) -> dict[str, float]:
    """Median of each strategy, in turns, over weights that together exceed the cache."""
    dtype, (m, k, n, width) = getattr(torch, case.dtype), case[1:5]
    count = min(_MOST_WEIGHTS, max(2, _PAST_THE_CACHE // (k * n * dtype.itemsize)))
    weights = [torch.randn(n, k, dtype=dtype) for _ in range(count)]
    down, up = torch.randn(width, n) / n**0.5, torch.randn(n, width) / width**0.5
    x, dy = torch.randn(m, k, dtype=dtype), torch.randn(m, n, dtype=dtype)
    learning = [tensor.requires_grad_(case.trains) for tensor in (x, down, up)]

    def run(strategy: str, weight: torch.Tensor) -> float:
        start = time.perf_counter()
        with torch.set_grad_enabled(case.trains):
            y = _forced(strategy, x, weight, down, up)
            if case.trains:
                torch.autograd.grad(y, learning, dy)
        return (time.perf_counter() - start) * 1e3

    names = list(cpu_tables.STRATEGIES[case.op])
    times: dict[str, list[float]] = {name: [] for name in names}
    shuffle, turn = random.Random(0).shuffle, 0
    for number in range(rounds + 1):
        shuffle(names)
        for name in names:
            elapsed = run(name, weights[turn % count])
            turn += 1
            if number:  # the first round warms up
                times[name].append(elapsed)
    return {name: round(statistics.median(values), 4) for name, values in times.items()}


def _forced(strategy: str, x, weight, down, up) -> torch.Tensor:
    operator = getattr(torch.ops.artemis, adapter_linear.__name__)
    return operator(
        x, weight, down, up, None, None, None, 1.0, None, "gelu", 0.0, None, "eager", strategy
    )
