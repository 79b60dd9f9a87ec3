"""Measured choices on this CPU: tables that `tune` writes and dispatch reads, once a process.

A file is named after the processor and its threads (`device.cpu_name`). It holds what was timed
and, in `choices`, the entries that beat the heuristic by more than `tune`'s margin:

    {"measured": {KEY: {"folded": ms, "plain": ms}}, "choices": {KEY: "plain"}}

KEY is `adapter_linear ROWS IN OUT WIDTH DTYPE` and `training` where gradients are wanted; ROWS is a
power of two and stands for all rows above half of it. A user's entry overrides a shipped one.
"""

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from .device import cpu_name

SHIPPED_TABLES = Path(__file__).parent / "tuned" / "cpu"
USER_TABLES = Path.home() / ".cache" / "artemis_kernels" / "tuned"
STRATEGIES = {"adapter_linear": ("folded", "plain")}


class Case(NamedTuple):
    """What a measured choice depends on; `rows` is a power of two."""

    op: str
    rows: int
    in_features: int
    out_features: int
    width: int
    dtype: str
    trains: bool

    @property
    def key(self) -> str:
        return " ".join(map(str, self[:-1])) + " training" * self.trains

    @classmethod
    def of(cls, key: str) -> "Case":
        """The case of a key; raises ValueError for any other text."""
        op, *sizes, dtype = key.removesuffix(" training").split(" ")
        rows, in_features, out_features, width = map(int, sizes)
        case = cls(op, rows, in_features, out_features, width, dtype, key.endswith(" training"))
        known = op in STRATEGIES and isinstance(getattr(torch, dtype, None), torch.dtype)
        if not known or case.key != key or min(case[1:5]) < 1 or rows & (rows - 1):
            raise ValueError(key)
        return case


class Entry(NamedTuple):
    """One measured choice and the name of the table that holds it."""

    case: Case
    strategy: str
    table: str


def path_of(folder: Path) -> Path:
    """Where `folder` keeps the table of this processor at the present number of threads."""
    return folder / f"{cpu_name()}.json"


def read(path: Path) -> dict[str, dict]:
    """The table at `path`, checked; empty where there is no file.

    Raises:
        ValueError: a file that is no such table, naming it and the key.
    """
    if not path.is_file():
        return {"measured": {}, "choices": {}}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a tuning table: {error}") from None
    parts = found.values() if isinstance(found, dict) else ()
    if (
        not parts
        or set(found) != {"measured", "choices"}
        or not all(isinstance(part, dict) for part in parts)
    ):
        raise ValueError(f"{path}: not a tuning table: it must hold 'measured' and 'choices'")
    for key in (*found["measured"], *found["choices"]):
        _check(path, key, found)
    return found


def _check(path: Path, key: str, found: dict[str, dict]) -> None:
    try:
        allowed = STRATEGIES[Case.of(key).op]
    except ValueError:
        raise ValueError(f"{path}: {key!r} is no key of a tuning table") from None
    chosen, times = found["choices"].get(key), found["measured"].get(key)
    if chosen is not None and chosen not in allowed:
        raise ValueError(f"{path}: {key!r}: got {chosen!r}, allowed: {', '.join(allowed)}")
    if not isinstance(times, dict) or set(times) != set(allowed):
        raise ValueError(f"{path}: {key!r}: its times must be those of {', '.join(allowed)}")


def write(path: Path, table: dict[str, dict]) -> None:
    """Replace the table at `path` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        staged = Path(scratch, path.name)
        with staged.open("w", encoding="utf-8") as file:
            json.dump(table, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)


@functools.cache
def _entries(user: Path, shipped: Path) -> tuple[Entry, ...]:
    found = {}
    for path, name in ((shipped, "shipped"), (user, "user's")):
        for key, strategy in read(path)["choices"].items():
            found[key] = Entry(Case.of(key), strategy, name)
    return tuple(found.values())


def entries() -> tuple[tuple, ...]:
    """Every choice for this processor as plain tuples, the user's in place of shipped ones."""
    found = _entries(path_of(USER_TABLES), path_of(SHIPPED_TABLES))
    return tuple((*case, strategy, table) for case, strategy, table in found)


entries._dynamo_marked_constant = True  # a fact of the machine, as in device.py


def choice(
    op: str, rows: int, in_features: int, out_features: int, width: int, dtype: str, trains: bool
) -> tuple[str, str] | None:
    """`(strategy, reason)` where one was measured, else None."""
    for name, most, k, n, r, kind, training, strategy, table in entries():
        same = (name, kind, training) == (op, dtype, trains)
        same = same and (k, n, r) == (in_features, out_features, width)
        if same and most // 2 < rows <= most:
            return strategy, f"tuned: it was the fastest here (the {table} table)"
    return None


def reload() -> None:
    """Let the next call read the tables again."""
    _entries.cache_clear()
