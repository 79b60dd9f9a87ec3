"""Steps measured in processes of their own: `worker` does the job, here it is read."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from ..errors import AdapterError
from .records import Record
from .steps import Step

INACCURATE = "fails the accuracy rule"
_WARMUP = 1


def measured(group: Sequence[Step], checked: Sequence[Step], rounds: int) -> list[Record]:
    """What a process saw of each step of `group`, timed in turns; without rounds, their memory.

    `checked` go through the gate first. Where memory did not suffice for all of them, what it
    ended is measured again, each step alone.
    """
    seen = _seen(group, checked, rounds)
    if len(group) > 1:
        for number, record in enumerate(seen):
            if record.get("failed") not in (None, INACCURATE):
                (seen[number],) = _seen(group[number : number + 1], checked, rounds)
    return seen


def _seen(group: Sequence[Step], checked: Sequence[Step], rounds: int) -> list[Record]:
    """The same, by one process. `failed` says why a step has not all its rounds."""
    job = {
        "steps": [step.to_dict() for step in group],
        "check": [number for number, step in enumerate(group) if step in checked],
        "rounds": rounds, "warmup": _WARMUP,
    }  # fmt: skip
    seen: list[Record] = [{} for _ in group]
    title, ended = f"{group[0].cell.model} {group[0].workload}", None
    with tqdm(total=len(group) * (rounds + 1), desc=title, disable=None, leave=False) as bar:
        for line in lines(job):
            if "error" in line:
                raise AdapterError(line["error"])
            if "killed" in line:
                ended = f"its process ended by signal {-line['killed']}"
                break
            record = seen[line.pop("step")]
            if "ms" in line:
                record.setdefault("ms", []).append(round(line["ms"], 4))
            else:
                record |= line
            bar.update()
    for record in seen:
        if not record.get("gate", {"passed": True})["passed"]:
            record["failed"] = INACCURATE
        elif ended and "memory" not in record and len(record.get("ms", ())) < max(rounds, 1):
            record["failed"] = ended
    return seen


def lines(job: Record) -> Iterator[Record]:
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
