"""Times of short calls on a device, in turns."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..cuda_graph import capture
from .turns import Spread, in_turns

_FLUSHED_BYTES = 1 << 28  # far past the last-level cache of a GPU or a CPU


class Timer:
    """Milliseconds: by events on a GPU, by the clock on a CPU.

    With `flush` a large buffer is written before each call, so that operands come from memory, as
    those of one layer after all the others do.
    """

    def __init__(self, device: torch.device, rounds: int, flush: bool = True) -> None:
        self.on_gpu, self.rounds = device.type == "cuda", rounds
        self.warmup = 0 if rounds == 1 else 2  # one round is a rehearsal, nothing to believe
        size = _FLUSHED_BYTES if flush else 1
        self.flushed = torch.empty(size, dtype=torch.uint8, device=device)

    def milliseconds(self, call: Callable[[], object], idle: bool = True) -> float:
        """Of one call. `idle`: a GPU has nothing else to do when it comes.

        Else what Python and launches cost is hidden, for as long as the buffer is being written.
        """
        self.flushed.zero_()
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        if idle:
            torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def best(self, call: Callable[[], object]) -> float:
        """Seconds of the fastest of several calls."""
        return min(self.interleaved({"": call}, idle=False)[""]) / 1e3

    def interleaved(
        self, calls: dict[str, Callable[[], object]], idle: bool = True
    ) -> dict[str, list[float]]:
        """Milliseconds of each call in each round, in an order of its own per round."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        measure = partial(self.milliseconds, idle=idle)
        for number, name, ms in in_turns(calls, self.warmup + self.rounds, measure):
            if number >= self.warmup:
                times[name].append(ms)
        return times

    def rows(
        self, calls: dict[str, Callable[[], object]], graphs: bool = True
    ) -> dict[str, dict[str, Any]]:
        """`{"ms": spread}` of each call, all in turns, and all of one kind.

        On a GPU the kind is `graph`: whether all times are those of CUDA graphs, without what
        Python and launches cost a short call. They are not where `graphs` is false, or where any of
        the calls cannot be captured. Both kinds stand beside: `eager_ms` of the call as it is, and
        `graph_ms` where there is a graph.
        """
        rows = {name: {"ms": spread} for name, spread in self._spreads(calls).items()}
        if self.on_gpu:
            found = {n: graph for n, call in calls.items() if graphs and (graph := captured(call))}
            everybody = found.keys() == calls.keys()
            for row in rows.values():
                row |= {"eager_ms": row["ms"], "graph": everybody}
            for name, spread in self._spreads(found, idle=False).items():
                rows[name] |= {"graph_ms": spread, "ms": spread if everybody else rows[name]["ms"]}
        return rows

    def _spreads(
        self, calls: dict[str, Callable[[], object]], idle: bool = True
    ) -> dict[str, dict[str, float]]:
        times = self.interleaved(calls, idle).items()
        return {name: Spread.of(milliseconds).to_dict(5) for name, milliseconds in times}


def captured(call: Callable[[], object]) -> Callable[[], object] | None:
    """The call as a CUDA graph, or None where it cannot be captured."""
    stream = torch.cuda.Stream()
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        return capture(call, stream).replay
    except RuntimeError:
        torch.cuda.synchronize()
        return None
