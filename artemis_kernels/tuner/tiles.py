"""Search for tile sizes: around the heuristic's, pruned three times before anything is timed.

1. by the shared memory that a pipelined loop stages and the registers of its accumulator (lower
   bounds, without compiling);
2. by the cost model: padding, unfilled waves, and what each tile reads again;
3. by the compiled artefact: registers that spill, shared memory beyond the chip's.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from ..core import tables, tiling, tuning
from ..core.device import Chip
from ..core.strategies import Case
from ..core.tiling import Config, Shape, whole_rank
from . import launches, timing
from .search import entry

MOST_COMPILED = 24  # of one kernel and shape, the best by the cost model
MOST_ACCUMULATORS = 128  # registers of a thread; it has 255, and operands need the others
_LIKELY = 1.5  # times the best predicted cost
#: The sides of a shape along which a kernel's tiles are programs; it walks along the others.
_GRID = {
    "shrink": "m",
    "expand": "mn",
    "one_pass": "mn",
    "update": "mn",
    "expand_backward": "m",
    "shrink_backward": "k",
    "row_block": "m",
}


class Resources(NamedTuple):
    """What a configuration compiles to; `stack` above 0 means spilled registers."""

    shared: int
    stack: int


def search(
    cases: Iterable[Case], path: Path, chip: Chip, device: torch.device, *, rounds: int,
    progress: bool,
) -> dict[str, dict]:  # fmt: skip
    """Entries of the tiles of every kernel that `cases` launch, in the table at `path` too."""

    def measure(kernel: str, shape: Shape, configs: list[Config]) -> dict[Config, list[float]]:
        launch = launches.launcher(kernel, shape, chip, _operands(device))
        runs = {config: lambda turn, config=config: launch(config) for config in configs}
        return timing.in_turns(runs, rounds, device)

    def resources(kernel: str, shape: Shape, config: Config) -> Resources:
        return compiled_resources(kernel, shape, config, chip)

    return tune_each(
        launches.of_cases(cases, chip), path, chip, resources=resources, measure=measure,
        rounds=rounds, progress=progress,
    )  # fmt: skip


def tune_each(
    wanted: list[tuple[str, Shape]],
    path: Path,
    chip: Chip,
    *,
    resources: Callable[[str, Shape, Config], Resources],
    measure: Callable[[str, Shape, list[Config]], dict[Config, list[float]]],
    rounds: int,
    progress: bool,
) -> dict[str, dict]:
    """Entries of `wanted` by key; the table is written after each that it lacked."""
    found = tables.read(path, chip)
    for kernel, shape in tqdm(wanted, "tiles", disable=None if progress else True):
        key = f"{kernel} {shape.bucket.key}"
        if key in found["tiles"]:
            continue
        usual = tiling.heuristic(kernel, shape.bucket, chip)
        configs = [usual] + [
            config
            for config in likely(kernel, shape, chip)
            if config != usual and _fits(resources(kernel, shape, config), chip)
        ]
        times = measure(kernel, shape, configs)
        chosen = timing.winner(times, usual)
        ms = {"chosen": times[chosen], "usual": times[usual]}
        found["tiles"][key] = entry(asdict(chosen), asdict(usual), ms, rounds)
        tables.write(path, found)
    asked = {f"{kernel} {shape.bucket.key}" for kernel, shape in wanted}
    return {key: one for key, one in found["tiles"].items() if key in asked}


def likely(kernel: str, shape: Shape, chip: Chip) -> list[Config]:
    """Configurations worth compiling, the best predicted first."""
    around = [
        config
        for config in neighbours(tiling.heuristic(kernel, shape.bucket, chip))
        if staged_bytes(kernel, shape, config) <= chip.shared_bytes
        and accumulators(config, shape, chip) <= MOST_ACCUMULATORS
    ]
    costs = {config: cost(kernel, shape, config, chip) for config in around}
    least = min(costs.values(), default=0.0)
    near = [config for config in around if costs[config] <= _LIKELY * least]
    return sorted(near, key=lambda config: costs[config])[:MOST_COMPILED]


def neighbours(usual: Config) -> list[Config]:
    """Half and double of each tile size, and other warps, stages and splits; all legal."""

    def sizes(size: int) -> tuple[int, ...]:
        return (size // 2, size, 2 * size) if size else (0,)

    splits = (1,) if usual.split == 1 else sizes(usual.split)
    found = [
        replace(usual, block_m=m, block_n=n, block_k=k, warps=warps, stages=stages, split=split)
        for m, n, k, warps, stages, split in product(
            sizes(usual.block_m), sizes(usual.block_n), sizes(usual.block_k), (4, 8),
            range(max(1, usual.stages - 1), usual.stages + 2), splits,
        )
    ]  # fmt: skip
    return [config for config in found if tiling.is_legal(config)]


def staged_bytes(kernel: str, shape: Shape, config: Config) -> int:
    """Shared memory of a kernel's pipelined loop, at least: its stages of operands."""
    size, m, n, k = shape.dtype.itemsize, config.block_m, config.block_n, config.block_k
    rank = config.block_r or whole_rank(shape.r)
    step = {
        "shrink": k * (m * size + rank * 4),
        "expand": k * (m + n) * size,
        "one_pass": k * ((m + n) * size + whole_rank(shape.r) * 4),
        "expand_backward": n * (m * size + whole_rank(shape.r) * 4),
        "shrink_backward": m * (k * size + rank * 4),
        "row_block": k * (m * size + whole_rank(shape.r) * 4),
    }.get(kernel, 0)
    return config.stages * step


def accumulators(config: Config, shape: Shape, chip: Chip) -> int:
    """Registers of a thread that hold the fp32 tile of a product."""
    sides = [size for size in (config.block_m, config.block_n or config.block_k) if size]
    if not config.block_n:
        sides[-1] = min(sides[-1], whole_rank(shape.r))
    threads = config.warps * chip.warp_size
    return sides[0] * sides[-1] // threads


def cost(kernel: str, shape: Shape, config: Config, chip: Chip) -> float:
    """Predicted time over that of a perfect launch: padding × unfilled waves × reads again.

    A tile of M × N makes `2·M·N / (M + N)` FLOPs an element that it reads; the cache below is
    taken to give three times the memory's bandwidth.
    """
    blocks = {"m": config.block_m, "n": config.block_n, "k": config.block_k}
    padding, programs = 1.0, config.split
    for side, block in blocks.items():
        size = getattr(shape, side)
        if size and block:
            count = -(-size // block)
            padding *= count * block / size
            programs *= count if side in _GRID[kernel] else 1
    waves = -(-programs // chip.processors) * chip.processors / programs
    across = config.block_k if kernel == "shrink_backward" else config.block_m
    along = config.block_n if _GRID[kernel] == "mn" else whole_rank(shape.r)
    intensity = 2 * across * along / ((across + along) * shape.dtype.itemsize)
    return padding * waves * max(1.0, tuning.balance(chip) / 3 / intensity)


def compiled_resources(kernel: str, shape: Shape, config: Config, chip: Chip) -> Resources:
    """The most that a launch of `kernel` with these tiles asks for, from its compiled artefacts."""
    from . import artefacts  # imports triton's compiler

    def meta(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    launch = launches.launcher(kernel, shape, chip, meta)
    made = [artefacts.compiled(one, chip) for one in artefacts.launches_of(lambda: launch(config))]
    return Resources(max(one.shared for one in made), max(one.stack for one in made))


def _fits(resources: Resources, chip: Chip) -> bool:
    return resources.shared <= chip.shared_bytes and not resources.stack


def _operands(device: torch.device) -> launches.New:
    def new(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if not dtype.is_floating_point:
            return torch.zeros(sizes, dtype=dtype, device=device)
        return torch.randn(sizes, dtype=torch.float32, device=device).to(dtype)

    return new
