"""Each tunable kernel as one call on operands of a shape: what tiles are compiled and timed on.

`new(*sizes, dtype=...)` makes an operand, on a GPU or the meta device. Options that no tile size
depends on are left at their defaults.
"""

import functools
from collections.abc import Callable

import torch

from ..core import tuning
from ..core.device import Chip
from ..core.tiling import Config, Shape
from ..ops.bottleneck_adapter.kernels import row_block
from ..ops.bottleneck_adapter.weight_gradients import sum_gradients, weight_gradients
from ..ops.few_rows.matvec import matvec
from ..ops.few_rows.shrink import shrink_rows
from ..ops.low_rank.arguments import NO_DROPOUT, UNSCALED, Dropout
from ..ops.low_rank.expand import expand, update
from ..ops.low_rank.expand_backward import expand_backward
from ..ops.low_rank.expand_persistent import expand_persistent
from ..ops.low_rank.one_pass import one_pass
from ..ops.low_rank.shrink import shrink
from ..ops.low_rank.shrink_backward import shrink_backward
from ..ops.low_rank.sum_parts import sum_parts
from ..ops.packed.epilogue import Epilogue
from . import packed_launches

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


def _matvec(shape: Shape, chip: Chip, new: New):
    m, n, k, dtype = shape.m, shape.n, shape.k, shape.dtype
    x, weight = new(m, k, dtype=dtype), new(n, k, dtype=dtype)
    epilogue = Epilogue(new(m, shape.r), new(n, shape.r), scale=UNSCALED)
    return lambda config: matvec(x, weight, epilogue, config=config)


def _matvec_shrink(shape: Shape, chip: Chip, new: New):
    x, f = new(shape.m, shape.k, dtype=shape.dtype), new(shape.r, shape.k, dtype=shape.dtype)
    return lambda config: shrink_rows(x, f, config=config)


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
    """With the sum of its parts, whose number is searched; as the two below."""
    dy, b = new(shape.m, shape.n, dtype=shape.dtype), new(shape.n, shape.r)
    z, db = new(shape.m, shape.r), new(shape.n, shape.r)
    return lambda config: sum_parts(
        expand_backward(dy, b, z, config=config, with_columns=False)[1], db
    )  # fmt: skip


def _shrink_backward(shape: Shape, chip: Chip, new: New):
    x, s = new(shape.m, shape.k, dtype=shape.dtype), new(shape.m, shape.r)
    dropout, df = _dropout(shape, new), new(shape.r, shape.k)
    return lambda config: sum_parts(
        shrink_backward(x, s, config=config, dropout=dropout, with_columns=False)[0], df
    )  # fmt: skip


def _row_block(shape: Shape, chip: Chip, new: New):
    x = new(shape.m, shape.k, dtype=shape.dtype)
    down, up = new(shape.r, shape.k), new(shape.k, shape.r)
    return lambda config: row_block(
        x, down, up, x, config=config, stage="forward", activation="gelu", scale=UNSCALED,
        dropout=NO_DROPOUT,
    )  # fmt: skip


def _weight_gradients(shape: Shape, chip: Chip, new: New):
    x, dy = (new(shape.m, shape.k, dtype=shape.dtype) for _ in range(2))
    dz, h = (new(shape.m, shape.r, dtype=shape.dtype) for _ in range(2))
    ddown, dup = new(shape.r, shape.k), new(shape.k, shape.r)
    return lambda config: sum_gradients(
        weight_gradients(x, dy, dz, h, config=config), ddown, dup, scale=UNSCALED
    )  # fmt: skip


LAUNCHERS = {
    "shrink": _shrink,
    "matvec_tensor": _matvec,
    "matvec_shrink": _matvec_shrink,
    "expand": _expand,
    "one_pass": _one_pass,
    "update": _update,
    "expand_backward": _expand_backward,
    "shrink_backward": _shrink_backward,
    "row_block": _row_block,
    "weight_gradients": _weight_gradients,
    **{
        f"{kernel}_{format}": functools.partial(made, format)
        for kernel, made, formats in packed_launches.KERNELS
        for format in formats
    },
}
