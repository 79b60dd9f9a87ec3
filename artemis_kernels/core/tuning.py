"""What a fused call does on a chip: the tiles of each launch, and which launches.

`config` looks a kernel's tiles up: a measured table (the user's, then the shipped one), else the
heuristic of `core.tiling`. The strategies compare costs that are worked out in docs/low_rank.md
and say in one sentence what decided; an unknown chip gets the same treatment, never an error.
"""

import torch

from . import tables, tiling
from .device import INTERPRETER, Chip
from .device import chip as chip_of
from .tiling import FEW_ROWS, Config, Shape

# FLOPs of 16-bit products that take as long as one byte of memory traffic, by generation: dense
# peaks over bandwidth from NVIDIA's data sheets of A100, H100 and B200.
_BALANCE = {8: 156.0, 9: 240.0, 10: 281.0}

# How far Triton's product with pointer loads is taken to stay behind the vendor's until it is
# measured: the newer the tensor cores, the more they need what pointer loads do not give.
_VENDOR_GAP = {8: 0.05, 9: 0.15, 10: 0.25}

# Chips on which `make gpu` saw products by tensor descriptors agree with those by pointers and take
# less time. None yet: what a driver makes of a descriptor shows at a launch only, where nothing can
# stand in for it, so that pointers are the default until a chip has run both.
_DESCRIPTORS: frozenset[str] = frozenset()

_VENDOR_REASON = "in so long a product the vendor's GEMM gains more than another pass over y costs"
_EPILOGUE_REASON = "starting the accumulator from the low-rank term saves a pass over y"


def config(kernel: str, shape: Shape, chip: Chip) -> Config:
    """The configuration of `kernel` (a key of `tiling.HEURISTICS`) for a shape on a chip."""
    shape = shape.bucket
    return tables.tiles(kernel, shape, chip) or tiling.heuristic(kernel, shape, chip)


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
    rows: int, hidden: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, str]:
    """`(strategy, reason)` of a fused `bottleneck_adapter` on a device."""
    return choose_bottleneck(Shape(rows, k=hidden, r=width, dtype=dtype), chip_of(device))


def choose_lora(shape: Shape, drops: bool, chip: Chip) -> tuple[str, str]:
    """Among `one_pass`, `split` and `vendor` for y [m, n], x [m, k], rank r.

    One pass repeats `x Aᵀ` in each column of tiles: 2·m·k·r·(n / 128) FLOPs against a second read
    of x, 2·m·k bytes. Three quarters of the peak are taken as what a kernel reaches.
    """
    if not drops and shape.r <= tiling.MAX_ONE_PASS_RANK:
        if shape.m <= FEW_ROWS:
            return "one_pass", "with few rows the weight's traffic hides the repeated x Aᵀ"
        if tiling.whole_rank(shape.r) * shape.n < 128 * 0.75 * balance(chip):
            return "one_pass", "out is so small that repeating x Aᵀ beats a second read of x"
    if _vendor_wins(shape, chip):
        return "vendor", _VENDOR_REASON
    return "split", _EPILOGUE_REASON


def choose_adapter(shape: Shape, trains: bool, chip: Chip) -> tuple[str, str]:
    """Among `folded`, `folded_vendor` and `plain` for y [m, n], x [m, k], width r.

    Folding costs 2·r·n·k FLOPs for `D W`, in training as many again for dD, and saves the passes
    over y0: one read in the forward, a write and two reads more in training.
    """
    folding = (4 if trains else 2) * shape.r * shape.n * shape.k
    saved = (4 if trains else 1) * shape.m * shape.n * shape.dtype.itemsize
    if folding > saved * balance(chip):
        return "plain", "there are too few rows to repay the product D W"
    if _vendor_wins(shape, chip):
        return "folded_vendor", _VENDOR_REASON
    return "folded", _EPILOGUE_REASON


def choose_bottleneck(shape: Shape, chip: Chip) -> tuple[str, str]:
    """Between `row_block` and `two_launch` for x [m, k], width r."""
    widest = tiling.max_row_block_width(chip)
    if shape.r > widest:
        return "two_launch", f"a width beyond {widest} does not fit a row block's registers"
    if shape.m < 32 * chip.processors:
        return "two_launch", "there are too few blocks of rows to fill the chip"
    return "row_block", "one launch reads x once, and again from the cache"


def multiplies_by_descriptors(shape: Shape, chip: Chip) -> bool:
    """Whether a fused product [m, n] of 16-bit operands that TMA can address is the persistent one.

    For Hopper's sake, where its tile takes a whole processor anyway. A tile that draws a mask, and
    those of Blackwell, do better with two programs a processor, of which one multiplies at a time.
    """
    wide = shape.dtype.itemsize == 2 and shape.m > FEW_ROWS
    return chip.name in _DESCRIPTORS and wide and not shape.masked


def balance(chip: Chip) -> float:
    """FLOPs of 16-bit products that take as long as one byte of memory traffic."""
    return _BALANCE.get(chip.generation // 10, 240.0)


def vendor_gap(chip: Chip) -> float:
    """The share of the vendor's rate that a Triton product is taken to lack."""
    return _VENDOR_GAP.get(chip.generation // 10, 0.15)


def _vendor_wins(shape: Shape, chip: Chip) -> bool:
    """Whether the gap's share of 2·m·n·k FLOPs takes longer than reading and writing y again."""
    if chip.name == INTERPRETER or shape.m <= FEW_ROWS:
        return False
    if shape.dtype == torch.float32:
        return True  # Triton multiplies fp32 without the vendor's kernels for it
    return vendor_gap(chip) * 2 * shape.k > 2 * shape.dtype.itemsize * balance(chip)
