"""What a launch or a compilation can end in, and what a row says of it."""

import subprocess
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import triton

#: Of one case, which fails, not the run. Descriptors check by asserting; Triton has the launcher
#: of every kernel built by a C compiler.
FAILURES = (
    RuntimeError, ValueError, TypeError, AssertionError, OSError, subprocess.CalledProcessError,
    triton.TritonError,
)  # fmt: skip

Row = dict[str, Any]


def out_of_memory(error: Exception) -> bool:
    """Whether a GPU's memory ran out; Triton and cuBLAS say so in words."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def failure(error: Exception) -> Row:
    """`passed` is None where memory ran out: what did not run is not known to be wrong."""
    passed = None if out_of_memory(error) else False
    return {"passed": passed, "where": f"{type(error).__name__}: {error}"[:300]}


def tried(
    calls: dict[str, Callable[[], object]], rows: dict[str, Row]
) -> dict[str, Callable[[], object]]:
    """Those of `calls` that run, each tried once; of one that does not, its row says why."""
    running = {}
    for name, call in calls.items():
        try:
            call()
        except FAILURES as error:
            rows[name] |= failure(error)
        else:
            running[name] = call
    return running


def contained(rows: Iterable[Row], about: Row) -> Iterator[Row]:
    """The rows of one workload; where it breaks off, one says so, and the next workload comes."""
    try:
        yield from rows
    except FAILURES as error:
        yield about | {"provider": "artemis"} | failure(error)


def of_each(
    kind: str, workloads: Iterable[NamedTuple], measured: Callable[[Any], Iterable[Row]]
) -> Iterator[Row]:
    """The rows of every workload, each with what the workload is."""
    for work in workloads:
        about = {"kind": kind, **work._asdict()}
        yield from contained((about | row for row in measured(work)), about)
