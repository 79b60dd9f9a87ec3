"""Measured choices: tables that `tune` writes and dispatch reads, once a process.

A file is named after a chip (`sm_90`) or after this processor and its threads
(`device.cpu_name`), and holds what was timed, whether or not it won:

    {"strategies": {Case.key: ENTRY}, "tiles": {"KERNEL Shape.key": ENTRY}}

ENTRY is `{"chosen", "usual", "ms", "rounds", "torch", "triton", "date"}`: `usual` is what would be
taken without a table, `chosen` the same unless another won by `tune`'s rule, and `ms` gives
`[20th percentile, median, 80th]` of both. In `strategies` they are names; in `tiles` fields of a
`Config`, and `ms` has the keys "chosen" and "usual". A user's entry overrides a shipped one.
"""

import functools
import json
import os
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch

from . import tiling
from .device import CHIPS, INTERPRETER, Chip, cache_folder, cpu_name
from .device import chip as chip_of
from .strategies import Case, candidates, known
from .tiling import Config, Shape

SHIPPED_TABLES = Path(__file__).parent / "tuned"
USER_TABLES = None if cache_folder() is None else cache_folder() / "tuned"  # None: no home
PARTS = ("strategies", "tiles")
CPU = "cpu"
_KEYS = {"chosen", "usual", "ms", "rounds", "torch", "triton", "date"}
_FIELDS = {field.name for field in fields(Config)}


class Entry(NamedTuple):
    """A measured strategy other than the usual one, as dispatch reads it."""

    most: int  # rows: for all from above half of it
    sizes: tuple[int, int, int]  # in, out, width
    strategy: str
    usual: str
    reason: str


def name_of(chip: Chip | None) -> str:
    """The name of a chip's table, or of this processor's where that is None."""
    return cpu_name() if chip is None else chip.name


def path_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def empty() -> dict[str, dict]:
    return {part: {} for part in PARTS}


def read(path: Path, chip: Chip | None) -> dict[str, dict]:
    """The table at `path` of a chip, checked; empty where there is no file.

    Raises:
        ValueError: a file that is no such table, naming it and the key.
    """
    if not path.is_file():
        return empty()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a tuning table: {error}") from None
    if (
        not isinstance(found, dict)
        or set(found) != set(PARTS)
        or not all(isinstance(part, dict) for part in found.values())
    ):
        raise ValueError(f"{path}: not a tuning table: it must hold {' and '.join(PARTS)}")
    for part, complaint in zip(PARTS, (_wrong_strategy, _wrong_tiles), strict=True):
        for key, entry in found[part].items():
            wrong = _wrong_entry(entry) or complaint(key, entry, chip) or _wrong_times(entry["ms"])
            if wrong:
                raise ValueError(f"{path}: {key!r}{wrong}")
    return found


def _wrong_entry(entry: object) -> str:
    """What is wrong, as the end of a sentence that starts with the key; here and below."""
    if not isinstance(entry, dict) or set(entry) != _KEYS:
        return f": an entry must hold {', '.join(sorted(_KEYS))}"
    return "" if isinstance(entry["ms"], dict) else ": ms must map names to times"


def _wrong_strategy(key: str, entry: dict, chip: Chip | None) -> str:
    try:
        allowed = known(Case.of(key), chip)
    except ValueError:
        return " is no key of a tuning table"
    for name in (entry["chosen"], entry["usual"]):
        if name not in allowed:
            return f": got {name!r}, allowed: {', '.join(allowed) or 'nothing'}"
    if not {entry["chosen"], entry["usual"]} <= set(entry["ms"]):
        return ": ms must give the times of chosen and usual"
    return ""


def _wrong_tiles(key: str, entry: dict, chip: Chip | None) -> str:
    kernel, _, shape = key.partition(" ")
    if chip is None or kernel not in tiling.HEURISTICS or not tiling.is_key(shape):
        return " is no key of a tuning table"
    for tile in (entry["chosen"], entry["usual"]):
        sized = isinstance(tile, dict) and set(tile) == _FIELDS
        if not sized or not all(type(size) is int and size >= 0 for size in tile.values()):
            return f": got {tile!r}, allowed: integers for {', '.join(sorted(_FIELDS))}"
        if not tiling.is_legal(kernel, Config(**tile)):
            least, step = tiling.least_tile(kernel), tiling.least_step(kernel)
            allowed = f"powers of two, tiles from {least}, block_k from {step}, up to 8 warps"
            return f": got {tile!r}, allowed: {allowed}"
    if set(entry["ms"]) != {"chosen", "usual"}:
        return ": ms must give the times of chosen and usual"
    return ""


def _wrong_times(times: dict) -> str:
    for name, three in times.items():
        numbers = isinstance(three, list) and len(three) == 3
        if not numbers or not all(isinstance(ms, int | float) and ms > 0 for ms in three):
            return f": times of {name!r} must be three positive numbers, got {three!r}"
        if sorted(three) != three:
            return f": percentiles of {name!r} must rise, got {three!r}"
    return ""


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
def _merged(name: str, chip: Chip | None) -> tuple[tuple[str, str, dict, str], ...]:
    """`(part, key, entry, whose)` of every entry for a chip, the user's in place of shipped."""
    found = {}
    for folder, whose in ((SHIPPED_TABLES, "shipped"), (USER_TABLES, "user's")):
        if folder is None:
            continue
        table = read(path_of(folder, name), chip)
        for part in PARTS:
            for key, entry in table[part].items():
                found[part, key] = (part, key, entry, whose)
    return tuple(found.values())


@functools.cache
def _strategies(name: str, chip: Chip | None) -> dict[tuple, tuple[tuple, ...]]:
    """Winners by what a call knows without looking at sizes: the fields of `Entry`."""
    found: dict[tuple, list[Entry]] = {}
    for part, key, entry, whose in _merged(name, chip):
        chosen, usual, ms = entry["chosen"], entry["usual"], entry["ms"]
        if part != "strategies" or chosen == usual:
            continue
        case = Case.of(key)
        if chosen not in candidates(case, chip):  # tuned where more was compiled
            continue
        reason = (
            f"tuned: {ms[chosen][1]:.4g} ms against {ms[usual][1]:.4g} ms of {usual}"
            f" (the {whose} table of {name})"
        )
        what = (case.op, case.dtype, case.weight, case.trains, case.drops)
        found.setdefault(what, []).append(Entry(case.rows, case[2:5], chosen, usual, reason))
    return {what: tuple(map(tuple, each)) for what, each in found.items()}


def entries(
    chip: str, op: str, dtype: str, weight: str, trains: bool, drops: bool
) -> tuple[tuple, ...]:
    """Winners for a call on a chip (`CPU`: this processor) as plain tuples."""
    on = None if chip == CPU else CHIPS.get(chip) or Chip(chip, 1, 1 << 16)
    return _strategies(name_of(on), on).get((op, dtype, weight, trains, drops), ())


entries._dynamo_marked_constant = True  # a fact of the machine, as in device.py


def choice(case: Case, impl: str, device: torch.device, usual: tuple[str, str]) -> tuple[str, str]:
    """`(strategy, reason)` of a call on a path: a measured winner over the usual one, or that.

    `case.rows` may be any number. An entry holds where what it beat is the usual strategy.
    """
    if impl == "eager" and device.type != "cpu":
        return usual
    chip = CPU if impl == "eager" else chip_of(device).name
    drops = False
    if case.drops:  # a branch: under torch.compile it may be symbolic, as no constant's argument is
        drops = True
    for most, sizes, strategy, beaten, reason in entries(
        chip, case.op, case.dtype, case.weight, case.trains, drops
    ):
        k, n, r = sizes
        same = case.in_features == k and case.out_features == n and case.width == r
        if same and most // 2 < case.rows <= most and beaten == usual[0]:
            return strategy, reason
    return usual


@functools.cache
def _tiles(name: str, chip: Chip) -> dict[str, tuple[Config, Config, str]]:
    """Winners, each with what it beat and whose it is."""
    return {
        key: (Config(**entry["chosen"]), Config(**entry["usual"]), whose)
        for part, key, entry, whose in _merged(name, chip)
        if part == "tiles" and entry["chosen"] != entry["usual"]
    }


@tiling.by_shape
def tiles(kernel: str, shape: Shape, chip: Chip) -> tuple[Config, str]:
    """The configuration of a kernel for a shape, which is bucketed, and where it comes from.

    That is the "user's" or the "shipped" table, where it has an entry that beat what the heuristic
    says; else "default", which is the heuristic.
    """
    shape = shape.bucket
    usual = tiling.heuristic(kernel, shape, chip)
    measured = {} if chip.name == INTERPRETER else _tiles(chip.name, chip)
    chosen, beaten, whose = measured.get(f"{kernel} {shape.key}", (usual, usual, "default"))
    return (chosen, whose) if beaten == usual else (usual, "default")


def reload() -> None:
    """Let the next call read the tables again."""
    for cached in (_merged, _strategies, _tiles, tiles):
        cached.cache_clear()
