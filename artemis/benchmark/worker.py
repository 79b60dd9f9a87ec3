"""The process that steps run in: a job on standard input, JSON lines on standard output.

A job is `{"steps": [...], "check": [...], "rounds": n, "warmup": n}`; `check` holds the numbers of
the steps that go through the gate first. Lines are `{"step": i, ...}` with `ms` (one round),
`gate` (a verdict), `trained_parameters` or `memory`; or `{"error": ...}`, the last.
"""

import json
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from transformers.utils import logging

from ..errors import AdapterError
from ..training import keep_freed_memory
from .compiling import make_room_for_graphs, nothing_compiled
from .runner import in_turns
from .steps import Step, check, measure_memory, prepare


def run(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Do the job; steps that fail the gate are not timed."""
    steps = [Step.from_dict(values) for values in job["steps"]]
    if steps[0].workload == "memory":
        yield {"step": 0, "memory": measure_memory(steps[0])}
        return
    keep_freed_memory()
    providers, counts = {}, {}
    for number, step in enumerate(steps):
        prepared = prepare(step)
        yield {"step": number, "trained_parameters": prepared.step.trained_parameters}
        if number in job["check"]:
            verdict = check(step, prepared)
            yield {"step": number, "gate": verdict.to_dict() | {"passed": verdict.passed}}
            if not verdict.passed:
                continue
        providers[number], counts[number] = prepared.run, prepared.count
    for _ in in_turns(providers, job["warmup"]):
        pass
    with nothing_compiled():
        for _, number, milliseconds in in_turns(providers, job["rounds"]):
            yield {"step": number, "ms": milliseconds / counts[number]}


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
