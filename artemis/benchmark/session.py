"""One run of a benchmark: which steps are known, where the others run, and the file of results."""

import json
import subprocess
import sys
import uuid
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import AdapterError
from ..training import keep_freed_memory
from . import machine
from .memory import available_memory, total_memory
from .peaks import peaks as measured_peaks
from .runner import Spread, append, read
from .steps import Step

_SHARE = 0.8  # of the memory: what the steps of one process may need together
_RESERVE = 1 << 30  # for Python and torch
_BLOCKS = 2  # where not all steps fit into one process, processes alternate this often
_INACCURATE = "fails the accuracy rule"
Record = dict[str, Any]


class Session:
    """Measures steps, each once, and appends what it learns to a file of JSON lines.

    With `resume`, what the file holds already is not measured again, unless it was cut short; nor
    do times count that were taken with another allocator.

    Raises:
        AdapterError: the file to resume comes from another machine, thread count or torch.
    """

    def __init__(self, path: Path | None = None, resume: bool = False):
        self.path, self.run = path, uuid.uuid4().hex[:12]
        self.head: Record = {
            "kind": "run", "run": self.run, **machine.facts(keep_freed_memory()),
            "gpu": machine.accelerator(),
        }  # fmt: skip
        self.records: list[Record] = []
        self._header_is_written = False
        if resume and path is not None and path.exists():
            self._take_over(read(path))

    def _take_over(self, records: list[Record]) -> None:
        own = machine.identity(self.head)
        heads = {record["run"]: record for record in records if record["kind"] == "run"}
        for head in heads.values():
            if machine.identity(head)._replace(allocator=own.allocator) != own:
                raise AdapterError(
                    f"--resume: {self.path} was measured on {_named(head)}, and this is"
                    f" {_named(self.head)}; allowed: the same processor, threads and torch"
                )
        if {head["commit"] for head in heads.values()} - {self.head["commit"]}:
            warnings.warn(f"--resume: {self.path} holds results of another commit", stacklevel=2)
        self.records = [
            record
            for record in records
            if record["kind"] != "run"
            and record.get("failed") in (None, _INACCURATE)
            and ("memory" in record or machine.identity(heads[record["run"]]) == own)
        ]

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
        together = sum(step.estimated_bytes for step in steps) < _SHARE * total_memory() - _RESERVE
        blocks = 1 if together else min(_BLOCKS, rounds)
        share = -(-rounds // blocks)
        for block in range(blocks):
            wanted = min(rounds, (block + 1) * share)
            pending = [s for s in steps if self._rounds(s) < wanted and self.failed(s) is None]
            for group in self._packed(pending):
                check = [
                    number
                    for number, step in enumerate(group)
                    if step in checked and self.value(step, "gate") is None
                ]
                job = {"check": check, "rounds": share, "warmup": 1}
                for step, seen in zip(group, self._run_job(group, job), strict=True):
                    self.save({"kind": "step", **step.to_dict(), **seen})

    def measure_memory(self, steps: Sequence[Step]) -> None:
        """Peak and states of each step, each in a process of its own."""
        for step in steps:
            if self.value(step, "memory") is None and self._fits(step):
                (seen,) = self._run_job([step], {"check": [], "rounds": 0, "warmup": 0})
                self.save({"kind": "step", **step.to_dict(), **seen})

    def _rounds(self, step: Step) -> int:
        return sum(len(record.get("ms", ())) for record in self.find(step))

    def _packed(self, steps: Sequence[Step]) -> Iterator[list[Step]]:
        """Groups that fit into memory together, in order, without the steps that never fit."""
        group: list[Step] = []
        for step in steps:
            if not self._fits(step):
                continue
            budget = _SHARE * available_memory() - _RESERVE
            if group and sum(s.estimated_bytes for s in (*group, step)) > budget:
                yield group
                group = []
            group.append(step)
        if group:
            yield group

    def _fits(self, step: Step) -> bool:
        needed, there = step.estimated_bytes, available_memory() - _RESERVE
        if needed > there:
            reason = f"needs about {needed / 1e9:.1f} GB, {there / 1e9:.1f} GB are available"
            print(f"not measured: {step}: {reason}", file=sys.stderr)
            return False
        return True

    def _run_job(self, group: list[Step], job: Record) -> list[Record]:
        """What a worker process saw of each step."""
        seen: list[Record] = [{} for _ in group]
        self.peaks()
        lines = len(group) * (job["rounds"] + 1)
        title = f"{group[0].cell.model} {group[0].workload}"
        with tqdm(total=lines, desc=title, disable=None, leave=False) as bar:
            for line in _lines({"steps": [step.to_dict() for step in group], **job}):
                if "error" in line:
                    raise AdapterError(line["error"])
                if "killed" in line:
                    failed = {"failed": f"its process ended by signal {-line['killed']}"}
                    return [failed] * len(group)
                record = seen[line.pop("step")]
                if "ms" in line:
                    record.setdefault("ms", []).append(round(line["ms"], 4))
                else:
                    record |= line
                bar.update()
        for record in seen:
            if not record.get("gate", {"passed": True})["passed"]:
                record["failed"] = _INACCURATE
        return seen


def _lines(job: Record) -> Iterator[Record]:
    """The lines of a worker that does `job`; `{"killed": status}` where a signal ended it."""
    command = [sys.executable, "-m", "artemis.benchmark.worker"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            process.stdin.write(json.dumps(job))
            process.stdin.close()
            for line in process.stdout:
                yield json.loads(line)
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.kill()
        status = process.wait()
    if status < 0:
        yield {"killed": status}
    elif status:
        raise subprocess.CalledProcessError(status, command)


def _named(head: Record) -> str:
    it = machine.identity(head)
    return f"{it.gpu or it.processor} ({it.threads} threads, torch {it.torch})"
