"""Tile sizes of each kernel for a shape on a chip: deterministic, without a measurement.

A heuristic fills the chip, keeps accumulators in registers and stages in shared memory; tests/aot
holds every choice to that for the chips that matter. A measured table (`core.tables`) may
override any of them.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .device import INTERPRETER, Chip

MAX_ONE_PASS_RANK = 64
MAX_ONE_READ_RANK = 64
WIDEST_RANK_OF_A_WIDE_TILE = 128
FEW_ROWS = 64
#: Up to so many rows, and such a low-rank term, products walk along rows of W without tensor cores.
MATVEC_ROWS, MATVEC_RANK = 4, 128

# The least block_k of the kernels whose dots need more than 16 numbers in it: tensor cores take
# 8-bit operands by 32, and a step of int4 feeds two dots with half of it each.
_LEAST_STEPS = {"eight_bit_int8": 32, "eight_bit_fp8": 32, "weight_only_int4": 32}

_WIDEST_ROW = 16384  # that a program holds in registers

#: Cache of what follows from a shape: bounded, since rows may be others in every call.
by_shape = functools.lru_cache(maxsize=4096)


@dataclass(frozen=True)
class Config:
    """Tile sizes of one launch; a size is 0 where the kernel does not tile that dimension.

    `block_m` rows, `block_n` and `block_k` columns (outputs, inputs), `block_r` rank or width (0
    also where it is taken whole); `split` is the number of parts that the reduction is cut into.
    """

    block_m: int
    block_n: int = 0
    block_k: int = 0
    block_r: int = 0
    split: int = 1
    warps: int = 4
    stages: int = 3


class Shape(NamedTuple):
    """What a configuration may depend on.

    Sizes (0 where a kernel has no such dimension), the dtype of x, and whether a dropout mask is
    drawn for a matrix of full width inside.
    """

    m: int
    n: int = 0
    k: int = 0
    r: int = 0
    dtype: torch.dtype = torch.bfloat16
    masked: bool = False

    @property
    def bucket(self) -> "Shape":
        """The same with M rounded up to a power of two: what tables and heuristics see."""
        return Shape(next_power_of_2(max(1, self.m)), *self[1:])

    @property
    def key(self) -> str:
        """The name of this shape in a table."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.m} {self.n} {self.k} {self.r} {dtype}" + " masked" * self.masked


def is_key(text: str) -> bool:
    """Whether `text` is the `key` of a bucketed shape."""
    found = re.fullmatch(r"(\d+) \d+ \d+ \d+ (float32|float16|bfloat16)( masked)?", text)
    return found is not None and int(found[1]) == next_power_of_2(max(1, int(found[1])))


def least_tile(kernel: str) -> int:
    """The smallest tile that a kernel takes: a dot's, where it has one."""
    return 1 if kernel.startswith(("matvec", "round_rows")) else 16


def least_step(kernel: str) -> int:
    """The smallest block_k that the dots of a kernel take."""
    return _LEAST_STEPS.get(kernel, 16)


def is_legal(kernel: str, config: Config) -> bool:
    """Whether a kernel takes these sizes: powers of two, a dot's minimum, whole parts."""
    sizes = (config.block_m, config.block_n, config.block_k, config.block_r)
    least = least_tile(kernel)
    tiles = all(size == 0 or (size >= least and size & (size - 1) == 0) for size in sizes)
    tiles = tiles and (config.block_k == 0 or config.block_k >= least_step(kernel))
    return tiles and config.warps in (1, 2, 4, 8) and config.split >= 1 and config.stages >= 1


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def cdiv(size: int, block: int) -> int:
    """Blocks that cover a size. (Triton's is made for kernels: a microsecond at each launch.)"""
    return -(-size // block)


def whole_rank(r: int) -> int:
    """A tile that covers the rank: a dot needs 16, so rank 8 is padded inside the kernel."""
    return max(16, next_power_of_2(r))


def rank_block(r: int, limit: int) -> int:
    """A tile along the rank, where a kernel takes it in steps of at most `limit`."""
    return min(limit, whole_rank(r))


def max_row_block_width(chip: Chip) -> int:
    """The widest bottleneck whose hidden tile a row block keeps in registers."""
    return 64 if chip.backend == "hip" else 256


@functools.cache
def heuristic(kernel: str, shape: Shape, chip: Chip) -> Config:
    """The configuration of `kernel` (a key of `HEURISTICS`) where nothing was measured."""
    return worked_out(kernel, shape, chip)


def worked_out(kernel: str, shape: Shape, chip: Chip) -> Config:
    """`heuristic` without a cache: what torch.compile traces, which warns of caches."""
    if chip.name == INTERPRETER:
        return _interpreted(shape)
    return HEURISTICS[kernel](shape, chip)


def _interpreted(shape: Shape) -> Config:
    """Small tiles, so that tests on small matrices meet several of them, and split sums too."""
    reduced = max(shape.n, shape.k)
    return Config(32, 32, 32, rank_block(shape.r, 32), split=2 if reduced > 32 else 1)


def _shrink(shape: Shape, chip: Chip) -> Config:
    fp32, registers = shape.dtype == torch.float32, _multiplies_from_registers(chip)
    # Rows that vectors do not reach: every element brings its own address and mask, which a large
    # tile spills.
    ragged = shape.r % 8 != 0 or shape.k % 8 != 0
    block_m = min(32 if ragged and registers else 64, max(16, shape.m))
    block_r = rank_block(shape.r, 32 if fp32 else 64 if ragged else 128)
    # F arrives in fp32, twice the bytes of x: beside a wide one the step along k is halved.
    block_k = 32 if fp32 or shape.k % 8 else 128 if block_r <= 32 else 64
    split = _parts_to_fill(
        chip, cdiv(shape.m, block_m) * cdiv(shape.r, block_r), shape.k // block_k
    )
    stages = _stages(chip, 3, block_k * (block_m * shape.dtype.itemsize + block_r * 4))
    # Where k is cut, the stage's mask and z come later, in small tiles.
    crowded = registers or (ragged and split == 1)
    warps = 8 if block_r > (32 if crowded else 64) else 4
    return Config(
        block_m, block_k=block_k, block_r=block_r, split=split, warps=warps, stages=stages
    )


def _product(shape: Shape, chip: Chip) -> Config:
    """Tile of a base product [m, k] x [k, n]."""
    if shape.dtype == torch.float32:
        tile = Config(64, 64, 16)
    elif shape.m <= FEW_ROWS:
        # The weight streams past: many small column tiles, deep along k.
        tile = Config(max(16, shape.m), 32, 128, stages=5)
    elif shape.k % 16 or shape.n % 16:
        # Unaligned rows: no vector loads, and copies through registers, which a large tile spills.
        tile = Config(64, 64, 32, stages=2)
    elif chip.backend == "hip":
        tile = Config(128, 128, 32, warps=8)
    elif _multiplies_from_registers(chip):
        tile = Config(128, 128, 32, warps=4 if shape.r <= 16 else 8, stages=4)
    elif shape.masked or shape.r > WIDEST_RANK_OF_A_WIDE_TILE or chip.generation >= 100:
        # Two programs a processor: one draws its mask, or stores, while the other multiplies.
        tile = Config(128, 128, 64, warps=8)
    elif 2 * cdiv(shape.m, 128) * cdiv(shape.n, 256) < chip.processors:
        tile = Config(128, 128, 64, warps=8, stages=4)
    else:
        tile = Config(128, 256, 64, warps=8)
    stage = (tile.block_m + tile.block_n) * tile.block_k * shape.dtype.itemsize
    return replace(tile, stages=_stages(chip, tile.stages, stage))


def _expand(shape: Shape, chip: Chip) -> Config:
    # The low-rank product fills the accumulator's registers first: small steps, or it spills.
    return replace(_product(shape, chip), block_r=rank_block(shape.r, 32))


def _one_pass(shape: Shape, chip: Chip) -> Config:
    tile = _product(shape, chip)
    # Two accumulators and their product live at once.
    tile = replace(tile, block_n=min(tile.block_n, 128))
    if shape.m > FEW_ROWS:
        tile = replace(tile, warps=8)
    columns = (tile.block_m + tile.block_n) * shape.dtype.itemsize + whole_rank(shape.r) * 4
    return replace(tile, stages=_stages(chip, tile.stages, columns * tile.block_k))


def _update(shape: Shape, chip: Chip) -> Config:
    if shape.dtype == torch.float32:
        return Config(32, 64, block_r=rank_block(shape.r, 32), stages=1)
    return Config(min(64, max(16, shape.m)), 128, block_r=rank_block(shape.r, 64), stages=1)


def _expand_backward(shape: Shape, chip: Chip) -> Config:
    fp32 = shape.dtype == torch.float32
    block_m, block_n = min(64 if fp32 else 128, max(16, shape.m)), 32 if fp32 else 64
    split = _parts_to_fill(chip, cdiv(shape.m, block_m), shape.n // block_n)
    columns = block_m * shape.dtype.itemsize + whole_rank(shape.r) * 4
    stages = _stages(chip, 3, block_n * columns)
    warps = 8 if block_m == 128 else 4
    return Config(block_m, block_n, split=split, warps=warps, stages=stages)


def _shrink_backward(shape: Shape, chip: Chip) -> Config:
    fp32 = shape.dtype == torch.float32
    block_m = min(32 if fp32 or _multiplies_from_registers(chip) else 64, max(16, shape.m))
    block_r = rank_block(shape.r, 32 if fp32 else 128)
    block_k = 64 if fp32 or block_r > 64 else 128
    if block_r <= 32 and not fp32 and shape.k % 16 == 0 and chip.generation // 10 == 9:
        block_m, block_k = min(32, block_m), 256  # longer lines: up to 1.6 times as fast, measured
    split = _parts_to_fill(
        chip, cdiv(shape.k, block_k) * cdiv(shape.r, block_r), shape.m // block_m
    )
    stages = _stages(chip, 3, block_m * (block_k * shape.dtype.itemsize + block_r * 4))
    return Config(block_m, block_k=block_k, block_r=block_r, split=split, stages=stages)


def _weight_gradients(shape: Shape, chip: Chip) -> Config:
    """The backward of a shrink twice over: twice the programs share the rows."""
    tile = _shrink_backward(shape, chip)
    if shape.dtype == torch.float32:
        tile = replace(tile, warps=8)
    programs = 2 * cdiv(shape.k, tile.block_k) * cdiv(shape.r, tile.block_r)
    return replace(tile, split=_parts_to_fill(chip, programs, shape.m // tile.block_m))


def _row_block(shape: Shape, chip: Chip) -> Config:
    block_r = whole_rank(shape.r)
    block_k = 64 if block_r <= 64 else 32
    if shape.dtype == torch.float32:
        block_m, block_k = 16, 32
    else:
        block_m = 32 if cdiv(shape.m, 64) < 2 * chip.processors else 64
    stages = _stages(chip, 3, block_k * (block_m * shape.dtype.itemsize + block_r * 4))
    # On Blackwell dz and h beside the tile of out spill, with 4.
    warps = 8 if block_r > 64 or chip.generation >= 100 else 4
    return Config(block_m, block_k=block_k, warps=warps, stages=stages)


def _weight_only(shape: Shape, chip: Chip, bits: int) -> Config:
    """Weight tiles on the left: block_n is the dot's M, and rows of x are padded to 16."""
    if shape.dtype == torch.float32:
        tile = Config(16 if shape.m <= 16 else 32, 32, 32, stages=2)
    elif shape.m <= FEW_ROWS:
        tile = Config(max(16, shape.m), 64, 128, stages=4)
    else:
        tile = Config(64, 128, 64, warps=8)
    programs = cdiv(shape.m, tile.block_m) * cdiv(shape.n, tile.block_n)
    split = _parts_to_fill(chip, programs, shape.k // tile.block_k) if shape.m <= FEW_ROWS else 1
    step = tile.block_k * (tile.block_n * bits // 8 + tile.block_m * shape.dtype.itemsize)
    block_r = rank_block(shape.r, 32)
    return replace(tile, block_r=block_r, split=split, stages=_stages(chip, tile.stages, step))


def _matvec(shape: Shape, chip: Chip) -> Config:
    """Few rows of W a program: every processor has several, whose loads are under way together."""
    # Each row of x has sums of its own.
    tile = Config(0, 4 if shape.m == 1 else 2, 512 if shape.dtype == torch.float32 else 1024)
    step = tile.block_k * (tile.block_n + shape.m) * shape.dtype.itemsize
    return replace(tile, stages=_stages(chip, tile.stages, step))


def _matvec_int4(shape: Shape, chip: Chip) -> Config:
    """Half the bytes a step, and still 16 of them for each thread."""
    tile = _matvec(shape, chip)
    return tile if tile.block_n == 4 else replace(tile, block_k=2048)


def _matvec_shrink(shape: Shape, chip: Chip) -> Config:
    """A row of F a program, with all of its loads under way at once, or nearly."""
    widest = 4096 if shape.m == 1 else 2048
    block_k = max(16, min(widest, next_power_of_2(shape.k)))
    return Config(0, 1, block_k, warps=8 if block_k == 4096 else 4, stages=1)


def _eight_bit(shape: Shape, chip: Chip, wide: bool = False) -> Config:
    """Tile of a product [m, k] x [k, n] of 8-bit numbers; `wide`: whose sums leave it room."""
    if shape.k % 16 or shape.n % 16:
        tile = Config(64, 64, 32, stages=2)
    elif shape.m <= FEW_ROWS and chip.generation // 10 == 9:
        tile = Config(64, 64, 128, stages=4)
    elif chip.backend == "hip" or _multiplies_from_registers(chip):
        tile = Config(128, 128, 64, warps=8)
    elif shape.masked and chip.generation >= 100:  # a mask beside a wider accumulator spills
        tile = Config(128, 64, 128, warps=8, stages=4)
    else:
        tile = Config(128, 128, 128, warps=8, stages=4)
        fills = 2 * cdiv(shape.m, 128) * cdiv(shape.n, 256) >= chip.processors
        if wide and fills and not shape.masked and chip.generation // 10 == 9:
            tile = replace(tile, block_n=256)  # 1.18 times as fast, measured
    stage = (tile.block_m + tile.block_n) * tile.block_k
    tile = replace(tile, block_r=rank_block(shape.r, 32))
    return replace(tile, stages=_stages(chip, tile.stages, stage))


def _round_rows(shape: Shape, chip: Chip) -> Config:
    """block_m and block_k round; block_n and split are those of the columns' maxima, for int8.

    One program reads the parts of all columns: no more of them than keep the chip busy.
    """
    block_n = 128 if chip.backend == "hip" else 64  # 16 bytes a lane
    busy = 1024 * chip.processors // (block_n * cdiv(max(1, shape.n), block_n))
    split = max(1, min(64, busy, next_power_of_2(shape.m) // 256))
    return replace(_round_rows_alone(shape, chip), block_n=block_n, split=split, stages=2)


def _round_rows_alone(shape: Shape, chip: Chip) -> Config:
    """Whole rows in registers, 32 numbers a thread or one row; else steps along 16 rows."""
    width = next_power_of_2(max(16, shape.n))
    if width > _WIDEST_ROW:
        return Config(16, block_k=512, warps=8, stages=1)
    return Config(min(16, max(1, 8192 // width)), block_k=width, warps=8, stages=1)


def _round_logits(shape: Shape, chip: Chip) -> Config:
    """A program walks along one row, each thread with one wide load a step."""
    return Config(0, block_k=2048, warps=8, stages=1)


def _unpack(shape: Shape, chip: Chip) -> Config:
    return Config(0, 32, 256, stages=1)


def _transpose(shape: Shape, chip: Chip) -> Config:
    """Whole lines of 128 bytes on either side, and four accesses of 16 bytes a thread."""
    if shape.k % 16 or shape.n % 16:
        return Config(0, 64, 64, warps=8, stages=1)  # each byte brings its own address and mask
    return Config(0, 128, 128, warps=8, stages=1)


HEURISTICS: dict[str, Callable[[Shape, Chip], Config]] = {
    "shrink": _shrink,
    "expand": _expand,
    "one_pass": _one_pass,
    "update": _update,
    "expand_backward": _expand_backward,
    "shrink_backward": _shrink_backward,
    "row_block": _row_block,
    "weight_gradients": _weight_gradients,
    # For a few rows: by what is read, a tensor, a packed format or the factor of a shrink.
    "matvec_tensor": _matvec,
    "matvec_int8": _matvec,
    "matvec_fp8": _matvec,
    "matvec_int4": _matvec_int4,
    "matvec_shrink": _matvec_shrink,
    # Over a packed weight: by its format, which decides what is loaded, summed and decoded.
    "weight_only_int8": lambda shape, chip: _weight_only(shape, chip, 8),
    "weight_only_fp8": lambda shape, chip: _weight_only(shape, chip, 8),
    "weight_only_int4": lambda shape, chip: _weight_only(shape, chip, 4),
    "eight_bit_int8": lambda shape, chip: _eight_bit(shape, chip, wide=True),
    "eight_bit_fp8": _eight_bit,
    "round_rows_int8": _round_rows,
    "round_rows_fp8": _round_rows_alone,
    "round_logits_int8": _round_logits,
    "finish_product_int8": _update,
    "finish_product_fp8": _update,
    "unpack_int8": _unpack,
    "unpack_fp8": _unpack,
    "unpack_int4": _unpack,
    "transpose_int8": _transpose,
    "transpose_fp8": _transpose,
}


def _multiplies_from_registers(chip: Chip) -> bool:
    """Whether both operands of a product pass through registers: wgmma reads shared memory."""
    return chip.backend == "cuda" and not 90 <= chip.generation < 120


def _parts_to_fill(chip: Chip, programs: int, steps: int) -> int:
    """Power of two, at most 64, that makes about two programs a processor of `programs`.

    A part keeps at least 4 of the `steps` along the reduction.
    """
    wanted = 2 * chip.processors // max(1, programs)
    parts = min(wanted, steps // 4, 64)
    return 1 << (parts.bit_length() - 1) if parts > 1 else 1


def _stages(chip: Chip, wanted: int, stage_bytes: int) -> int:
    """Stages of a pipelined loop that fit: AMD keeps one in registers and needs no more than 2."""
    fitting = max(1, int(0.95 * chip.shared_bytes) // stage_bytes)
    return min(wanted, fitting, 2 if chip.backend == "hip" else wanted)
