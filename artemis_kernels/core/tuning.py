"""What a fused call does on a chip: the tiles of each launch, and which launches.

`config` looks a kernel's tiles up: a measured table (the user's, then the shipped one), else the
heuristic of `core.tiling`. The strategies compare costs that are worked out in docs/low_rank.md
and say in one sentence what decided; an unknown chip gets the same treatment, never an error.
"""

import math

import torch

from . import tables, tiling
from .device import INTERPRETER, Chip
from .device import chip as chip_of
from .tiling import FEW_ROWS, Config, Shape

# FLOPs of 16-bit products that take as long as one byte of memory traffic, by generation: dense
# peaks over bandwidth from NVIDIA's data sheets of A100, H100 and B200.
_BALANCE = {8: 156.0, 9: 240.0, 10: 281.0}

# How far Triton's product stays behind the vendor's: with pointer loads in 16 bits, and in 8 bits.
# Measured on an H200 (docs/gpu.md), assumed elsewhere: the newer the tensor cores,
# the more they need what pointer loads do not give.
_VENDOR_GAP = {8: 0.05, 9: 0.20, 10: 0.25}
_EIGHT_BIT_GAP = {8: 0.05, 9: 0.30, 10: 0.25}

# Chips on which products by tensor descriptors were seen to agree with those by pointers and to
# take less time. What a driver makes of a descriptor shows at a launch only, where nothing can
# stand in for it, so that pointers are the default until a chip has run both.
_DESCRIPTORS = frozenset({"sm_90"})

# Rows a processor from which one launch of row blocks beats two that are cut finer: at 62 on an
# H200 it took 1.4 times as long.
_ROWS_OF_BLOCKS = 256

# Bytes that memory moves during one launch more, 3 µs at 2 to 5 TB/s: what a launch may save.
_LAUNCH_BYTES = 8e6

_VENDOR_REASON = "the vendor's GEMM gains more than another pass over y costs"
_EPILOGUE_REASON = "starting the accumulator from the low-rank term saves a pass over y"


def config(kernel: str, shape: Shape, chip: Chip) -> Config:
    """The configuration of `kernel` (a key of `tiling.HEURISTICS`) for a shape on a chip."""
    return tables.tiles(kernel, shape, chip)[0]


def lora_strategy(
    rows: int, in_features: int, out_features: int, rank: int, drops: bool, dtype: torch.dtype,
    device: torch.device,
) -> tuple[str, str]:  # fmt: skip
    """`(strategy, reason)` of a fused `lora_linear` on a device."""
    shape = Shape(rows, out_features, in_features, rank, dtype)
    return choose_lora(shape, drops, chip_of(device))


def adapter_strategy(
    rows: int, in_features: int, out_features: int, width: int, trains: bool, dtype: torch.dtype,
    device: torch.device,
) -> tuple[str, str]:  # fmt: skip
    """`(strategy, reason)` of a fused `adapter_linear` on a device."""
    shape = Shape(rows, out_features, in_features, width, dtype)
    return choose_adapter(shape, trains, chip_of(device))


def bottleneck_strategy(
    rows: int, hidden: int, width: int, trains: bool, dtype: torch.dtype, device: torch.device
) -> tuple[str, str]:
    """`(strategy, reason)` of a fused `bottleneck_adapter` on a device."""
    return choose_bottleneck(Shape(rows, k=hidden, r=width, dtype=dtype), trains, chip_of(device))


def choose_lora(shape: Shape, drops: bool, chip: Chip) -> tuple[str, str]:
    """Among `one_pass`, `split` and `vendor` for y [m, n], x [m, k], rank r.

    One pass repeats `x Aᵀ` in each column of tiles, and of few rows it is the reads of A that
    count. With many rows its two accumulators leave so small a tile that a second read of x is
    cheaper, however small the output.
    """
    if walks_rows(shape):
        return "split", "so few rows read the weight once, without tensor cores, in one launch"
    one_pass = not drops and shape.r <= tiling.MAX_ONE_PASS_RANK and shape.m <= FEW_ROWS
    if one_pass and _weight_hides_a(shape, chip):
        return "one_pass", "with few rows the weight's traffic hides the repeated x Aᵀ"
    if _vendor_wins(shape, chip):
        return "vendor", _VENDOR_REASON
    return "split", _EPILOGUE_REASON


def choose_adapter(shape: Shape, trains: bool, chip: Chip, copied: float = 0.0) -> tuple[str, str]:
    """Among `folded`, `folded_vendor` and `plain` for y [m, n], x [m, k], width r.

    Folding costs 2·r·n·k FLOPs for `D W`, in training as many again for dD, and trades passes over
    y0 for passes over x. Plain reads y0 for the bottleneck, and again for the sum that it writes;
    back, dY and y0 for the gradients, dY once more for the sum that dX is made of, which it writes.
    Folded, x is read in either direction, and dY once. The vendor's product has y, and back dX,
    read and written once more. `copied`: bytes that dense copies move, which `D W` and dD take of
    a packed weight.
    """
    vendor = _vendor_wins(shape, chip)
    folding = (4 if trains else 2) * shape.r * shape.n * shape.k
    saved = 6 * shape.n - 2 * shape.k if trains else 3 * shape.n - shape.k
    if vendor:
        saved -= 2 * (shape.n + shape.k) if trains else 2 * shape.n
    if folding / balance(chip) + copied > saved * shape.m * shape.dtype.itemsize:
        return "plain", "the product D W and passes over x cost more than passes over y0"
    return ("folded_vendor", _VENDOR_REASON) if vendor else ("folded", _EPILOGUE_REASON)


def choose_bottleneck(shape: Shape, trains: bool, chip: Chip) -> tuple[str, str]:
    """Among `row_block`, `two_launch` and `two_launch_one_read` for x [m, k], width r."""
    widest = tiling.max_row_block_width(chip)
    if shape.r > widest:
        why = f"a width beyond {widest} does not fit a row block's registers"
    elif shape.m < _ROWS_OF_BLOCKS * chip.processors:
        why = "there are too few blocks of rows to keep the memory busy"
    else:
        why = "one launch reads x once, and again from the cache"
        return "row_block", why + "; dD and dU take one launch together" * trains
    if not trains:
        return "two_launch", why
    if shape.r <= tiling.MAX_ONE_READ_RANK:
        again, parts = (bottleneck_gradient_bytes(shape, one, chip) for one in (False, True))
        if parts < again:
            return "two_launch_one_read", f"{why}; parts of dU are fewer bytes than dY again"
    return "two_launch", f"{why}; dD and dU take one launch together"


def bottleneck_gradient_bytes(shape: Shape, one_read: bool, chip: Chip) -> float:
    """What forming dD and dU moves beyond x and the first read of dY, in two launches' backward.

    Apart, dz and dU come from one read of dY, for which every block of rows stores a part of dU,
    and dD takes a launch more. Jointly dY and h are read again, and few parts are stored: of
    either sum as many as fill the chip, about (`tiling` has them exactly).
    """
    m, k, r, size = shape.m, shape.k, shape.r, shape.dtype.itemsize
    filling, most = chip.processors * 128 / max(k, 1), m / 256
    if one_read:
        parts = 1 + m / (64 if size == 4 else 128) + max(1, min(2 * filling, most))
        return 8 * k * r * parts + _LAUNCH_BYTES
    return 8 * k * r * 2 * max(1, min(filling, most)) + size * m * (k + 2 * r)


@tiling.by_shape
def one_read(shape: Shape, chip: Chip) -> bool:
    """Whether `dY B` and `dYᵀ S` come from one read of dY [m, n] at rank r, or from two kernels."""
    if shape.r > tiling.MAX_ONE_READ_RANK:
        return False
    once, twice = (expand_gradient_bytes(shape, one, chip) for one in (True, False))
    return once <= twice


def expand_gradient_bytes(shape: Shape, one_read: bool, chip: Chip) -> float:
    """What the gradients behind dY [m, n] move beyond the first read of it.

    One read stores a part of B's gradient, 8·n·r bytes written and read, for every block of rows;
    two kernels read dY again, store as many parts as fill the chip, and take a launch more.
    """
    m, n, r, dtype = shape.m, shape.n, shape.r, shape.dtype
    if one_read:
        block = tiling.heuristic("expand_backward", shape.bucket, chip).block_m
        return 8 * n * r * -(-m // block)
    across = Shape(m, k=n, r=r, dtype=dtype).bucket
    parts = tiling.heuristic("shrink_backward", across, chip).split
    return 8 * n * r * parts + dtype.itemsize * m * n + _LAUNCH_BYTES


def multiplies_by_descriptors(shape: Shape, chip: Chip) -> bool:
    """Whether a fused product [m, n] of 16-bit operands that TMA can address is the persistent one.

    For Hopper's sake, where its tile takes a whole processor anyway. Those of Blackwell do better
    with two programs a processor, of which one multiplies at a time. A masked term is none of its:
    `draws_apart`.
    """
    wide = shape.dtype.itemsize == 2 and shape.m > FEW_ROWS
    return chip.name in _DESCRIPTORS and wide and not shape.masked


def draws_apart(shape: Shape, chip: Chip) -> bool:
    """Whether a masked term is added by an update, behind the vendor's product.

    A tile that draws its mask keeps the tensor cores waiting: on an H200 fused products of dX took
    1.2 to 1.5 times as long as the vendor's and an update together.
    """
    return chip.name in _DESCRIPTORS and shape.masked and shape.m > FEW_ROWS


def walks_rows(shape: Shape) -> bool:
    """Whether a product with m rows of x is `ops.few_rows`': no dot, the weight read once.

    Where a mask is drawn, or the rank is more than a thread can hold, it is a dot's.
    """
    few = shape.m <= tiling.MATVEC_ROWS
    return few and shape.r <= tiling.MATVEC_RANK and not shape.masked


def balance(chip: Chip) -> float:
    """FLOPs of 16-bit products that take as long as one byte of memory traffic."""
    return _BALANCE.get(chip.generation // 10, 240.0)


def vendor_gap(chip: Chip, eight_bit: bool = False) -> float:
    """The share of the vendor's rate that a Triton product is taken to lack."""
    gaps = _EIGHT_BIT_GAP if eight_bit else _VENDOR_GAP
    return gaps.get(chip.generation // 10, 0.15)


def _weight_hides_a(shape: Shape, chip: Chip) -> bool:
    """Whether A, read again in every column of tiles, takes no longer than W and a launch.

    A is fp32 [r, k]; the cache that keeps it is taken to give twice the memory's bandwidth.
    """
    columns = -(-shape.n // tiling.worked_out("one_pass", shape.bucket, chip).block_n)
    again = 4 * shape.r * shape.k * columns
    return again / 2 <= shape.n * shape.k * shape.dtype.itemsize + _LAUNCH_BYTES


def _vendor_wins(shape: Shape, chip: Chip) -> bool:
    """Whether what Triton's product lacks takes longer than reading and writing y again."""
    if chip.name == INTERPRETER or shape.m <= FEW_ROWS:
        return False
    if shape.dtype == torch.float32:
        return True  # Triton multiplies fp32 without the vendor's kernels for it
    gap = product_gap(shape, chip)
    return gap * 2 * shape.k > 2 * shape.dtype.itemsize * balance(chip)


def product_gap(shape: Shape, chip: Chip) -> float:
    """The share of the vendor's time that Triton's product y [m, n] in 16 bits takes longer.

    Of the persistent one: its last wave of tiles is filled in part, and with one wave only no tile
    is stored while the next is multiplied. On an H200 0.02 are left where waves are full.
    """
    if chip.name not in _DESCRIPTORS or shape.r > tiling.WIDEST_RANK_OF_A_WIDE_TILE:
        return vendor_gap(chip)
    waves = -(-shape.m // 128) * -(-shape.n // 256) / chip.processors
    return math.ceil(waves) / waves * 1.02 - 1 + (0.25 if waves <= 1 else 0.0)
