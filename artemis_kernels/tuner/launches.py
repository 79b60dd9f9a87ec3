"""Each tunable kernel as one call on operands of a shape: what tiles are compiled and timed on.

`new(*sizes, dtype=...)` makes an operand, on a GPU or the meta device. Options that no tile size
depends on are left at their defaults.
"""

from collections.abc import Callable, Iterable

import torch

from ..core import tiling, tuning
from ..core.device import Chip
from ..core.strategies import TENSOR, Case
from ..core.tiling import Config, Shape
from ..ops.bottleneck_adapter.kernels import row_block
from ..ops.low_rank.arguments import NO_DROPOUT, UNSCALED, Dropout
from ..ops.low_rank.expand import expand, update
from ..ops.low_rank.expand_backward import expand_backward
from ..ops.low_rank.expand_persistent import expand_persistent
from ..ops.low_rank.one_pass import one_pass
from ..ops.low_rank.shrink import shrink
from ..ops.low_rank.shrink_backward import shrink_backward

New = Callable[..., torch.Tensor]


def launcher(kernel: str, shape: Shape, chip: Chip, new: New) -> Callable[[Config], object]:
    """A function that launches `kernel` with given tiles on operands made once."""
    return LAUNCHERS[kernel](shape, chip, new)


def _dropout(shape: Shape, new: New) -> Dropout:
    return Dropout(0.1, new(1, dtype=torch.int64)) if shape.masked else NO_DROPOUT


def _shrink(shape: Shape, chip: Chip, new: New):
    x, f = new(shape.m, shape.k, dtype=shape.dtype), new(shape.r, shape.k)
    dropout = _dropout(shape, new)
    return lambda config: shrink(x, f, config=config, dropout=dropout)


def _expand(shape: Shape, chip: Chip, new: New):
    m, n, k, r, dtype = shape.m, shape.n, shape.k, shape.r, shape.dtype
    operands = new(m, k, dtype=dtype), new(n, k, dtype=dtype), new(m, r), new(n, r)
    options = {"scale": UNSCALED, "dropout": _dropout(shape, new)}
    aligned = k * dtype.itemsize % 16 == 0
    if tuning.multiplies_by_descriptors(shape, chip) and aligned:
        options["programs"] = chip.processors
        return lambda config: expand_persistent(*operands, config=config, **options)
    return lambda config: expand(*operands, config=config, **options)


def _one_pass(shape: Shape, chip: Chip, new: New):
    m, n, k, r, dtype = shape.m, shape.n, shape.k, shape.r, shape.dtype
    operands = new(m, k, dtype=dtype), new(n, k, dtype=dtype), new(r, k), new(n, r)
    return lambda config: one_pass(*operands, config=config, scale=UNSCALED)


def _update(shape: Shape, chip: Chip, new: New):
    y, dropout = new(shape.m, shape.n, dtype=shape.dtype), _dropout(shape, new)
    s, b = new(shape.m, shape.r), new(shape.n, shape.r)
    return lambda config: update(
        y, s, b, config=config, dtype=shape.dtype, scale=UNSCALED, dropout=dropout, out=y
    )


def _expand_backward(shape: Shape, chip: Chip, new: New):
    dy, b = new(shape.m, shape.n, dtype=shape.dtype), new(shape.n, shape.r)
    z = new(shape.m, shape.r)
    return lambda config: expand_backward(dy, b, z, config=config, with_columns=False)


def _shrink_backward(shape: Shape, chip: Chip, new: New):
    x, s = new(shape.m, shape.k, dtype=shape.dtype), new(shape.m, shape.r)
    dropout = _dropout(shape, new)
    return lambda config: shrink_backward(
        x, s, config=config, dropout=dropout, with_columns=False
    )  # fmt: skip


def _row_block(shape: Shape, chip: Chip, new: New):
    x = new(shape.m, shape.k, dtype=shape.dtype)
    down, up = new(shape.r, shape.k), new(shape.k, shape.r)
    return lambda config: row_block(
        x, down, up, x, config=config, stage="forward", activation="gelu", scale=UNSCALED,
        dropout=NO_DROPOUT,
    )  # fmt: skip


LAUNCHERS = {
    "shrink": _shrink,
    "expand": _expand,
    "one_pass": _one_pass,
    "update": _update,
    "expand_backward": _expand_backward,
    "shrink_backward": _shrink_backward,
    "row_block": _row_block,
}


def of_cases(cases: Iterable[Case], chip: Chip) -> list[tuple[str, Shape]]:
    """Every `(kernel, shape)` that strategies of `cases` over a tensor launch, once each."""
    found: dict[tuple[str, Shape], None] = {}
    for case in cases:
        if case.format == TENSOR and case.op != "quantized_linear":
            found |= dict.fromkeys(_of_case(case, chip))
    return list(found)


def _of_case(case: Case, chip: Chip) -> list[tuple[str, Shape]]:
    _, m, k, n, r = case[:5]
    lora, dtype = case.op == "lora_linear", case.torch_dtype
    masked = lora and case.drops  # the other operations draw masks of the bottleneck's width
    first = n if case.op == "bottleneck_adapter" else k
    found = [("shrink", Shape(m, k=first, r=r, dtype=dtype, masked=masked))]
    found.append(("update", Shape(m, n, r=r, dtype=dtype)))
    if k:
        found.append(("expand", Shape(m, n, k, r, dtype)))
    elif r <= tiling.max_row_block_width(chip):
        found.append(("row_block", Shape(m, k=n, r=r, dtype=dtype)))
    if lora and not case.drops and r <= tiling.MAX_ONE_PASS_RANK:
        found.append(("one_pass", Shape(m, n, k, r, dtype)))
    if case.trains:
        if r <= tiling.MAX_ONE_READ_RANK:
            found.append(("expand_backward", Shape(m, n, r=r, dtype=dtype)))
        found.append(("shrink_backward", Shape(m, k=first, r=r, dtype=dtype, masked=masked)))
        found.append(("update", Shape(m, first, r=r, dtype=dtype, masked=masked)))
        if k:
            found.append(("expand", Shape(m, k, n, r, dtype, masked)))
    return found
