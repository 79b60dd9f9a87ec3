"""How long a GPU works on a call: what is left of its time is Python's."""

from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def busy_ms(call: Callable[[], object]) -> float | None:
    """Milliseconds in which a GPU runs anything of the call; None where no profiler sees it."""
    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in seen.events()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
    except RuntimeError:
        return None
    return covered(spans) / 1e3 if spans else None


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of what the spans cover together; kernels of two streams may overlap."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
