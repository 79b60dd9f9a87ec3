"""The public function: which cases, on which chip, into which table."""

from collections.abc import Collection, Iterable
from pathlib import Path

import torch

from ..core import device as devices
from ..core import tables
from ..core.device import Chip
from ..core.strategies import Case
from ..core.tiling import next_power_of_2
from .requests import calls_of, check, check_device, check_kernels


def tune(
    shapes: Iterable[tuple[int, int, int]],
    rows: Iterable[int],
    *,
    op: str = "adapter_linear",
    weight: str = "tensor",
    dtype: str = "bfloat16",
    trains: bool = True,
    dropout_p: float = 0.0,
    device: torch.device | str = "cpu",
    rounds: int = 9,
    table: str | Path | None = None,
    progress: bool = True,
) -> dict[str, dict]:
    """Time the strategies of an operation, and on a GPU its kernels' tiles; keep what wins.

    A winner beats the built-in choice by more than 5 % in the median of `rounds` rounds, with
    percentiles (20 and 80) that do not overlap. The table is written after every case, and what it
    holds is not timed again: an interrupted run goes on where it stopped.

    Args:
        shapes: `(in, out, width)` of the layers; width is the rank of `lora_linear` and not looked
            at by `quantized_linear`; `bottleneck_adapter` works on `out`. Those of a group's
            members, in their order, where `op` is one.
        rows: numbers of rows; each stands for all down to half its power of two.
        op: "lora_linear", "adapter_linear", "bottleneck_adapter", "quantized_linear"; or
            "frozen_linear:" and what is frozen: "lora", "folded" or "plain" (a bottleneck); or
            "lora_linear_group", "adapter_linear_group": strategies are its members', tiles those of
            their joint width too.
        weight: "tensor", or a packed format and its activation bits, as "int8:auto", "int4:16".
        dtype: of x and a tensor weight, by name; the adapter is float32.
        trains: time forward and backward, else the forward under `no_grad` (always of
            `frozen_linear`).
        dropout_p: whether dropout is drawn (0.1 is timed for any value above 0).
        device: "cpu", or a GPU.
        rounds: timed rounds, in which all take turns.
        table: folder to write in; None is the user's, which dispatch reads.
        progress: whether to show a bar on a terminal.

    Returns:
        What the table holds of these cases, `{"strategies": {case: entry}, "tiles": {kernel and
        shape: entry}}`, with the entries of docs/tuning.md.

    Raises:
        ValueError: an unknown operation, weight, dtype or device, a GPU that the kernels do not run
            on, sizes or rounds below 1; a table that is malformed; no folder to write in.
    """
    shapes, rows, device = tuple(map(tuple, shapes)), tuple(rows), torch.device(device)
    check("tune", shapes, rows, rounds, op, weight, dtype)
    check_device("tune", device, dtype)
    check_kernels("tune", device, dtype)
    rows = tuple(map(next_power_of_2, rows))
    calls = calls_of(op, shapes, rows, dtype, weight, trains, dropout_p > 0).values()
    chip = None if device.type == "cpu" else devices.chip(device)
    folder = tables.USER_TABLES if table is None else Path(table)
    if folder is None:
        raise ValueError("tune: there is no home folder for the user's table; give one by `table`")
    path = tables.path_of(folder, tables.name_of(chip))
    with devices.made_current(device):
        return _tuned(calls, path, chip, device, rounds, progress)


def _tuned(
    calls: Collection[tuple[Case, ...]], path: Path, chip: Chip | None, device: torch.device,
    rounds: int, progress: bool,
) -> dict[str, dict]:  # fmt: skip
    """Tiles first, so that strategies are timed with them."""
    from . import search  # not before somebody tunes: tqdm, and for tiles triton

    tiled = {}
    if chip is not None:
        from . import tiles

        tiled = tiles.search(calls, path, chip, device, rounds=rounds, progress=progress)
        tables.reload()
    found = search.of_calls(calls, path, chip, device, rounds=rounds, progress=progress)
    tables.reload()
    return {"strategies": found, "tiles": tiled}
