"""One run of a benchmark: which steps are known, where the others run, and the file of results."""

import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..training import keep_freed_memory
from . import machine
from .budget import obstacle, within_memory
from .jobs import INACCURATE, measured
from .peaks import peaks as measured_peaks
from .records import Record, append
from .resuming import known
from .steps import Step
from .turns import Spread

_BLOCKS = 2  # where not all steps fit into one process, processes alternate this often


class Session:
    """Measures steps, each once, and appends what it learns to a file of JSON lines.

    With `resume`, what the file holds already is not measured again, if it counts: see
    `resuming.known`.

    Raises:
        AdapterError: the file to resume comes from another machine, thread count or torch.
        OSError: nothing can be appended to the file.
    """

    def __init__(self, path: Path | None = None, resume: bool = False):
        self.path, self.run = path, uuid.uuid4().hex[:12]
        self.head: Record = {
            "kind": "run", "run": self.run, **machine.facts(keep_freed_memory()),
            "gpu": machine.accelerator(),
        }  # fmt: skip
        self.records: list[Record] = []
        self._header_is_written = False
        if path is None:
            return
        if resume and path.exists():
            self.records = known(path, self.head)
        append(path, [])  # what cannot be written is known before anything is measured

    def save(self, record: Record) -> None:
        """Keep a record, and append it to the file."""
        record = {"run": self.run, **record}
        self.records.append(record)
        if self.path is not None:
            lines = [record] if self._header_is_written else [self.head, record]
            append(self.path, lines)
            self._header_is_written = True

    def peaks(self) -> dict[str, float]:
        """What the machine can do, measured once in this run, before anything else is."""
        if "peaks" not in self.head:
            self.head["peaks"] = measured_peaks()
            torch.cuda.empty_cache()  # the steps' processes need the memory
        return self.head["peaks"]

    def find(self, step: Step) -> list[Record]:
        """What is known of a step."""
        return [r for r in self.records if r["kind"] == "step" and Step.from_dict(r) == step]

    def spread(self, step: Step) -> Spread | None:
        """Milliseconds over all its rounds, or None where it was not timed."""
        times = [ms for record in self.find(step) for ms in record.get("ms", ())]
        return Spread.of(times) if times else None

    def failed(self, step: Step) -> str | None:
        """Why a step has no figure, where that is known."""
        return next((r["failed"] for r in self.find(step) if "failed" in r), None)

    def value(self, step: Step, name: str) -> Any:
        """A figure of a step by its name in the records, or None."""
        return next((r[name] for r in self.find(step) if name in r), None)

    def time(self, steps: Sequence[Step], checked: Sequence[Step], rounds: int) -> None:
        """Time steps in turns: in one process where they fit, else in alternating blocks.

        `checked` go through the gate before their first round. Rounds that are known count.
        """
        wanted = self._pending(steps, rounds)
        if wanted:
            self.peaks()  # which takes memory, so before that is shared out
        wanted = [step for step in wanted if self._fits(step, checked)]
        blocks = min(_BLOCKS, rounds) if len(within_memory(wanted, checked)) > 1 else 1
        share = -(-rounds // blocks)
        for block in range(blocks):
            pending = self._pending(wanted, min(rounds, (block + 1) * share))
            unchecked = [step for step in checked if self.value(step, "gate") is None]
            for group in within_memory(pending, unchecked):
                self._measure(group, unchecked, share)

    def measure_memory(self, steps: Sequence[Step]) -> None:
        """Peak and states of each step, each in a process of its own."""
        for step in steps:
            if self.value(step, "memory") is None and self._fits(step, ()):
                self._measure([step], (), rounds=0)

    def _pending(self, steps: Sequence[Step], rounds: int) -> list[Step]:
        """Those that lack some of `rounds`, and may have them."""
        return [step for step in steps if self._rounds(step) < rounds and not self.failed(step)]

    def _rounds(self, step: Step) -> int:
        return sum(len(record.get("ms", ())) for record in self.find(step))

    def _fits(self, step: Step, checked: Sequence[Step]) -> bool:
        reason = obstacle(step, checked)
        if reason:
            _say(step, reason)
        return reason is None

    def _measure(self, group: Sequence[Step], checked: Sequence[Step], rounds: int) -> None:
        self.peaks()
        for step, seen in zip(group, measured(group, checked, rounds), strict=True):
            self.save({"kind": "step", **step.to_dict(), **seen})
            if seen.get("failed") not in (None, INACCURATE):
                _say(step, seen["failed"])


def _say(step: Step, reason: str) -> None:
    print(f"not measured: {step}: {reason}", file=sys.stderr)
