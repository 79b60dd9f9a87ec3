"""How long a GPU works on a call, and on what: the rest of its time is Python's."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


class Work(NamedTuple):
    """`busy_ms`: in which anything ran. `kernels`: (name, launches, ms) each, longest first."""

    busy_ms: float
    kernels: list[tuple[str, int, float]]


def work_of(call: Callable[[], object]) -> Work | None:
    """What a GPU does for the call; None where no profiler sees it."""
    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        spans = [
            (event.name, event.time_range.start, event.time_range.end)
            for event in seen.events()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
    except RuntimeError:
        return None
    if not spans:
        return None
    return Work(covered((start, end) for _, start, end in spans) / 1e3, _by_kernel(spans))


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of what the spans cover together; kernels of two streams may overlap."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _by_kernel(spans: list[tuple[str, float, float]]) -> list[tuple[str, int, float]]:
    spent: dict[str, list[float]] = defaultdict(list)
    for name, start, end in spans:
        spent[name].append((end - start) / 1e3)
    every = [(name, len(each), sum(each)) for name, each in spent.items()]
    return sorted(every, key=lambda kernel: -kernel[2])
