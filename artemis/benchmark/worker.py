"""The process that steps run in: a job on standard input, JSON lines on standard output.

A job is `{"steps": [...], "check": [...], "rounds": n, "warmup": n}`; `check` holds the numbers of
the steps that go through the gate first. Lines are `{"step": i, ...}` with `trained_parameters` and
`gate` (a verdict), `ms` (one round), `memory`, or `failed` (the device has no more memory, which
ends that step); or `{"error": ...}`, the last.
"""

import json
import sys
import warnings
from collections.abc import Iterator

from transformers.utils import logging

from ..errors import AdapterError
from ..out_of_memory import is_out_of_memory
from ..training import keep_freed_memory
from .compiling import make_room_for_graphs, nothing_compiled
from .records import Record
from .steps import Prepared, Step, check, measure_memory, prepare
from .turns import in_turns

_NO_MEMORY = {"failed": "out of memory"}


class _Timed:
    """The call of a step that is timed; it does nothing once it has run out of memory."""

    def __init__(self, prepared: Prepared):
        self._run, self.count = prepared.run, prepared.count

    @property
    def ended(self) -> bool:
        return self._run is None

    def __call__(self) -> None:
        if self._run is None:
            return
        try:
            self._run()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._run = None  # and with it the model


def run(job: Record) -> Iterator[Record]:
    """Do the job; steps that fail the gate are not timed."""
    steps = [Step.from_dict(values) for values in job["steps"]]
    if steps[0].workload == "memory":
        yield {"step": 0, **_memory(steps[0])}
        return
    keep_freed_memory()
    providers: dict[int, _Timed] = {}
    for number, step in enumerate(steps):
        provider, seen = _ready(step, number in job["check"])
        yield {"step": number, **seen}
        if provider is not None:
            providers[number] = provider
    for _ in in_turns(providers, job["warmup"]):
        pass
    with nothing_compiled():
        for _, number, milliseconds in in_turns(providers, job["rounds"]):
            if not providers[number].ended:
                yield {"step": number, "ms": milliseconds / providers[number].count}
    for number, provider in providers.items():
        if provider.ended:
            yield {"step": number, **_NO_MEMORY}


def _ready(step: Step, checked: bool) -> tuple[_Timed | None, Record]:
    """What is timed of a step, unless it fails, and what is known of it before."""
    try:
        prepared = prepare(step)
        seen: Record = {"trained_parameters": prepared.step.trained_parameters}
        if checked:
            verdict = check(step, prepared)
            seen["gate"] = verdict.to_dict() | {"passed": verdict.passed}
            if not verdict.passed:
                return None, seen
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None, _NO_MEMORY
    return _Timed(prepared), seen


def _memory(step: Step) -> Record:
    try:
        return {"memory": measure_memory(step)}
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return _NO_MEMORY


def main() -> None:
    logging.set_verbosity_error()
    make_room_for_graphs()
    warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for what will go
    try:
        for line in run(json.load(sys.stdin)):
            print(json.dumps(line), flush=True)
    except AdapterError as error:
        print(json.dumps({"error": str(error)}), flush=True)
    except KeyboardInterrupt:  # the parent says so
        sys.exit(1)


if __name__ == "__main__":
    main()
