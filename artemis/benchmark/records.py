"""Files of results: JSON lines, appended as they come, read although the last was cut short."""

import json
import os
from pathlib import Path
from typing import Any

#: A line: what was measured, under `kind`.
Record = dict[str, Any]


def append(path: Path, records: list[Record]) -> None:
    """Add records to a file of JSON lines, which is made, and half a last line of it ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if _ends_within_a_line(path):
        lines = "\n" + lines
    with path.open("a", encoding="utf-8") as file:
        file.write(lines)


def read(path: Path) -> list[Record]:
    """The records of a file of JSON lines; a line that was cut short is none.

    A full disk, or a process that is killed, leaves half a record.
    """
    found = map(_record, path.read_text(encoding="utf-8").splitlines())
    return [record for record in found if record is not None]


def _ends_within_a_line(path: Path) -> bool:
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _record(line: str) -> Record | None:
    try:
        return json.loads(line)
    except ValueError:
        return None
