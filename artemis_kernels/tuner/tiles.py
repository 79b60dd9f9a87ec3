"""Search for tile sizes: around the heuristic's, pruned three times before anything is timed.

1. by the shared memory that a pipelined loop stages and the registers of its accumulator (lower
   bounds, without compiling);
2. by the cost model: padding, unfilled waves, and what each tile reads again;
3. by the compiled artefact: none, registers that spill, memory of a program beyond the chip's.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from triton.errors import TritonError

from ..core import tables, tiling, tuning
from ..core.device import Chip
from ..core.strategies import Case
from ..core.tiling import Config, Shape, whole_rank
from . import compilers, launches, lookups, timing
from .search import entry

MOST_COMPILED = 24  # of one kernel and shape, the best by the cost model
MOST_ACCUMULATORS = 128  # registers of a thread; it has 255, and operands need the others
_LIKELY = 1.5  # times the best predicted cost
_COLUMNS = 512  # of tensor memory, in every chip that has any


class Facts(NamedTuple):
    """What is known of a kernel without compiling it.

    `grid`: the sides of a shape along which its tiles are programs (it walks along the others);
    `tile`: the sides of the fp32 tile that it keeps, `r` the rank or its step; `step`: bytes that a
    stage of its loop holds, at least, from (config, itemsize of x, rank).
    """

    grid: str
    tile: str
    step: Callable[[Config, int, int], float] = lambda c, size, r: 0
    multiplies: bool = True


_FACTS = {
    "shrink": Facts("m", "mr", lambda c, size, r: c.block_k * (c.block_m * size + r * 4)),
    "expand": Facts("mn", "mn", lambda c, size, r: c.block_k * (c.block_m + c.block_n) * size),
    "one_pass": Facts(
        "mn", "mn", lambda c, size, r: c.block_k * ((c.block_m + c.block_n) * size + r * 4)
    ),
    "update": Facts("mn", "mn"),
    "expand_backward": Facts("m", "mr", lambda c, size, r: c.block_n * (c.block_m * size + r * 4)),
    "shrink_backward": Facts("k", "kr", lambda c, size, r: c.block_m * (c.block_k * size + r * 4)),
    "row_block": Facts("m", "mr", lambda c, size, r: c.block_k * (c.block_m * size + r * 4)),
    "weight_gradients": Facts("k", "kr", lambda c, size, r: c.block_m * (c.block_k + r) * size),
    "matvec": Facts("n", "nk", lambda c, size, r: c.block_k * c.block_n / 2, multiplies=False),
    "weight_only": Facts(
        "mn", "nm", lambda c, size, r: c.block_k * (c.block_n / 2 + c.block_m * size)
    ),
    "eight_bit": Facts("mn", "mn", lambda c, size, r: c.block_k * (c.block_m + c.block_n)),
    "round_rows": Facts("m", "mk", multiplies=False),
    "finish_product": Facts("mn", "mn"),
    "unpack": Facts("nk", "nk", multiplies=False),
    "transpose": Facts("nk", "nk", multiplies=False),
}


def facts(kernel: str) -> Facts:
    """Those of a key of `tiling.HEURISTICS`: a kernel, or one and the format it reads."""
    return _FACTS.get(kernel) or _FACTS[kernel.rpartition("_")[0]]


class Resources(NamedTuple):
    """What a configuration compiles to; `stack` above 0 means spilled registers."""

    shared: int
    stack: int
    columns: int = 0  # of tensor memory


def search(
    calls: Iterable[Sequence[Case]], path: Path, chip: Chip, device: torch.device, *, rounds: int,
    progress: bool, workers: int | None = None, most: int = MOST_COMPILED,
) -> dict[str, dict]:  # fmt: skip
    """Entries of the tiles of every kernel that `calls` launch, in the table at `path` too.

    `workers`: processes that compile, as many as there are cores unless given; one is this process.
    """

    def measure(kernel: str, shape: Shape, configs: list[Config]) -> dict[Config, list[float]]:
        launch = launches.launcher(kernel, shape, chip, _operands(device))
        runs = {config: lambda turn, config=config: launch(config) for config in configs}
        return timing.in_turns(runs, rounds, device)

    workers = compilers.usable_cores() if workers is None else workers
    with _compiling(chip, workers) as (resources, mapped):
        return tune_each(
            lookups.of_calls(calls, chip), path, chip, resources=resources, measure=measure,
            rounds=rounds, progress=progress, mapped=mapped, most=most,
        )  # fmt: skip


@contextlib.contextmanager
def _compiling(chip: Chip, workers: int) -> Iterator[tuple[Callable, Callable]]:
    """The `resources` and `mapped` of `tune_each`."""
    if workers == 1:
        yield lambda *what: compiled_resources(*what, chip), map
        return
    with compilers.side_by_side(chip, workers) as (compile_one, mapped):

        def resources(kernel: str, shape: Shape, config: Config) -> Resources | None:
            found = compile_one(kernel, shape, config)
            return found and Resources(*found)

        yield resources, mapped


def tune_each(
    wanted: list[tuple[str, Shape]],
    path: Path,
    chip: Chip,
    *,
    resources: Callable[[str, Shape, Config], Resources | None],
    measure: Callable[[str, Shape, list[Config]], dict[Config, list[float]]],
    rounds: int,
    progress: bool,
    mapped: Callable = map,
    most: int = MOST_COMPILED,
) -> dict[str, dict]:
    """Entries of `wanted` by key; the table is written after each that it lacked.

    An entry whose default is no longer today's is measured anew, as dispatch has left it.
    `resources` raises one of Triton's errors, or gives None, for tiles that it makes no code of;
    default tiles that do not run leave nothing to compare with, and no entry. `mapped` calls it, as
    `map` would, but may be ahead of what is read; `most`: how many are compiled beside the default.
    """
    found, asked = tables.read(path, chip), []
    for kernel, shape in wanted:
        usual = tiling.heuristic(kernel, shape.bucket, chip)
        if found["tiles"].get(_key(kernel, shape), {}).get("usual") != asdict(usual):
            others = [config for config in likely(kernel, shape, chip)[:most] if config != usual]
            needed = mapped(partial(_needed, resources, kernel, shape), [usual, *others])
            asked.append((kernel, shape, [usual, *others], needed))
    for kernel, shape, (usual, *others), needed in tqdm(
        asked, "tiles", disable=None if progress else True
    ):
        key = _key(kernel, shape)
        if not _runs(next(needed), chip):
            warnings.warn(f"tune: default tiles of {key!r} do not run on {chip.name}", stacklevel=2)
            continue
        fitting = [config for config, one in zip(others, needed, strict=True) if _fits(one, chip)]
        times = measure(kernel, shape, [usual, *fitting])
        chosen = timing.winner(times, usual)
        ms = {"chosen": times[chosen], "usual": times[usual]}
        found["tiles"][key] = entry(asdict(chosen), asdict(usual), ms, rounds)
        tables.write(path, found)
    keys = {_key(kernel, shape) for kernel, shape in wanted}
    return {key: one for key, one in found["tiles"].items() if key in keys}


def _key(kernel: str, shape: Shape) -> str:
    return f"{kernel} {shape.bucket.key}"


def likely(kernel: str, shape: Shape, chip: Chip) -> list[Config]:
    """Configurations worth compiling, the best predicted first."""
    around = [
        config
        for config in neighbours(kernel, tiling.heuristic(kernel, shape.bucket, chip))
        if staged_bytes(kernel, shape, config) <= chip.shared_bytes
        and accumulators(kernel, shape, config, chip) <= MOST_ACCUMULATORS
    ]
    costs = {config: cost(kernel, shape, config, chip) for config in around}
    least = min(costs.values(), default=0.0)
    near = [config for config in around if costs[config] <= _LIKELY * least]
    return sorted(near, key=lambda config: costs[config])[:MOST_COMPILED]


def neighbours(kernel: str, usual: Config) -> list[Config]:
    """Half and double of each tile size, and other warps, stages and splits; all legal.

    Where there are no stages, or no parts, none are tried.
    """

    def sizes(size: int) -> tuple[int, ...]:
        return tuple(dict.fromkeys((size // 2 or size, size, 2 * size)))

    splits = (1,) if usual.split == 1 else sizes(usual.split)
    warps = (2, 4, 8) if kernel.startswith("matvec") else (4, 8)
    stages = range(max(1, usual.stages - 1), usual.stages + 2) if usual.stages > 1 else (1,)
    found = [
        replace(usual, block_m=m, block_n=n, block_k=k, warps=count, stages=depth, split=split)
        for m, n, k, count, depth, split in product(
            sizes(usual.block_m), sizes(usual.block_n), sizes(usual.block_k), warps, stages, splits,
        )
    ]  # fmt: skip
    return [config for config in found if tiling.is_legal(kernel, config)]


def staged_bytes(kernel: str, shape: Shape, config: Config) -> float:
    """Shared memory of a kernel's pipelined loop, at least: its stages of operands."""
    rank = config.block_r or whole_rank(shape.r)
    return config.stages * facts(kernel).step(config, shape.dtype.itemsize, rank)


def accumulators(kernel: str, shape: Shape, config: Config, chip: Chip) -> int:
    """Registers of a thread that hold the fp32 tile which a kernel keeps."""
    rows, columns = _tile(kernel, shape, config)
    return rows * columns // (config.warps * chip.warp_size)


def _tile(kernel: str, shape: Shape, config: Config) -> tuple[int, int]:
    rank = config.block_r or whole_rank(shape.r)
    sides = {"m": config.block_m, "n": config.block_n, "k": config.block_k, "r": rank}
    one, other = facts(kernel).tile
    return sides[one], sides[other]


def cost(kernel: str, shape: Shape, config: Config, chip: Chip) -> float:
    """Predicted time over that of a perfect launch: padding × unfilled waves × reads again.

    A tile of M × N makes `2·M·N / (M + N)` FLOPs an element that it reads; the cache below is
    taken to give three times the memory's bandwidth.
    """
    blocks = {"m": config.block_m, "n": config.block_n, "k": config.block_k}
    known, padding, programs = facts(kernel), 1.0, config.split
    for side, block in blocks.items():
        size = getattr(shape, side)
        if size and block:
            count = -(-size // block)
            padding *= count * block / size
            programs *= count if side in known.grid else 1
    waves = -(-programs // chip.processors) * chip.processors / programs
    if not known.multiplies:
        return padding * waves
    rows, columns = _tile(kernel, shape, config)
    intensity = 2 * rows * columns / ((rows + columns) * shape.dtype.itemsize)
    return padding * waves * max(1.0, tuning.balance(chip) / 3 / intensity)


def compiled_resources(kernel: str, shape: Shape, config: Config, chip: Chip) -> Resources:
    """The most that a launch of `kernel` with these tiles asks for, from its compiled artefacts."""
    from . import artefacts  # imports triton's compiler

    def meta(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    launch = launches.launcher(kernel, shape, chip, meta)
    made = [artefacts.compiled(one, chip) for one in artefacts.launches_of(lambda: launch(config))]
    return Resources(*(max(getattr(one, name) for one in made) for name in Resources._fields))


def _needed(
    resources: Callable[[str, Shape, Config], Resources | None],
    kernel: str,
    shape: Shape,
    config: Config,
) -> Resources | None:
    """None where Triton makes no code of these tiles."""
    try:
        return resources(kernel, shape, config)
    except TritonError:
        return None


def _runs(resources: Resources | None, chip: Chip) -> bool:
    if resources is None:
        return False
    return resources.shared <= chip.shared_bytes and resources.columns <= _COLUMNS


def _fits(resources: Resources | None, chip: Chip) -> bool:
    return _runs(resources, chip) and not resources.stack


def _operands(device: torch.device) -> launches.New:
    def new(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if not dtype.is_floating_point:
            return torch.zeros(sizes, dtype=dtype, device=device)
        return torch.randn(sizes, dtype=torch.float32, device=device).to(dtype)

    return new
