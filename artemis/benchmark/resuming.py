"""What earlier runs left in a file of results, and what of it counts beside this run's own."""

import warnings
from collections import Counter
from pathlib import Path

from ..errors import AdapterError
from . import machine
from .jobs import INACCURATE
from .records import Record, read

#: What trained a model for minutes: it counts whatever code it was, but that is said.
_ACCURACIES = ("quality", "quality-trial")


def known(path: Path, head: Record) -> list[Record]:
    """The results in `path` that count in the run of `head`.

    Costs are those of one code: the same commit and packages, no changes since; and times those of
    one allocator. Accuracies count from any code. A warning says what does not count, or why
    something might not. A failure counts only if it is that of the accuracy rule.

    Raises:
        AdapterError: the file comes from another machine, thread count or torch.
    """
    records = read(path)
    heads = {record["run"]: record for record in records if record["kind"] == "run"}
    for other in heads.values():
        _require_same_machine(path, other, head)
    kept, dropped, doubtful = [], Counter(), Counter()
    for record in records:
        other = heads.get(record["run"])  # none where its line was cut short
        if other is None or not _is_result(record):
            continue
        difference = _difference(record, other, head)
        if difference is None or record["kind"] in _ACCURACIES:
            kept.append(record)
        if difference is not None:
            (doubtful if record["kind"] in _ACCURACIES else dropped)[difference] += 1
    _say(path, "results left out", dropped)
    _say(path, "results of other code that count", doubtful)
    return kept


def _require_same_machine(path: Path, other: Record, head: Record) -> None:
    own = machine.identity(head)
    if machine.identity(other)._replace(allocator=own.allocator) != own:
        raise AdapterError(
            f"--resume: {path} was measured on {_named(other)}, and this is {_named(head)};"
            " allowed: the same processor, threads and torch"
        )


def _named(head: Record) -> str:
    it = machine.identity(head)
    return f"{it.gpu or it.processor} ({it.threads} threads, torch {it.torch})"


def _is_result(record: Record) -> bool:
    """What was measured, and did not fail by chance.

    Rows about whole models are not measured: they are made of steps, each time anew.
    """
    if record["kind"] == "run" or record["kind"] == "row" and record["table"] != "kernels":
        return False
    return record.get("failed") in (None, INACCURATE)


def _difference(record: Record, other: Record, head: Record) -> str | None:
    """Why a result of the run `other` is not one of `head`; None where it could be."""
    if other["dirty"] or head["dirty"]:
        return "uncommitted changes"
    if other["commit"] != head["commit"]:
        return "another commit"
    if other["versions"] != head["versions"]:
        return "other versions of packages"
    if "ms" in record and machine.identity(other) != machine.identity(head):
        return "another allocator"
    return None


def _say(path: Path, what: str, reasons: Counter) -> None:
    if reasons:
        each = ", ".join(f"{count} ({reason})" for reason, count in reasons.items())
        warnings.warn(f"--resume: {path}: {what}: {each}", stacklevel=4)
