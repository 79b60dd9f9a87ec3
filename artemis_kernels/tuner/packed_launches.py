"""The kernels over a packed weight, as `launches` has the others; each takes the format first.

A tile serves forward and dX of a format: what needs more registers is what is compiled and timed
(e4m3 sums kept precise, columns of int8 apart).
"""

import torch

from ..core.device import Chip
from ..core.quantized import FORMATS, QuantizedWeight, default_group_size
from ..core.tiling import Shape
from ..ops.few_rows.matvec import matvec
from ..ops.low_rank.arguments import NO_DROPOUT, Dropout
from ..ops.packed.eight_bit import eight_bit
from ..ops.packed.epilogue import MOST_APART, Epilogue, finish
from ..ops.packed.round_rows import round_rows
from ..ops.packed.transpose import transpose
from ..ops.packed.unpack import unpack
from ..ops.packed.weight_only import weight_only

_NUMBERS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def _weight_only(format: str, shape: Shape, chip: Chip, new):
    x, weight = new(shape.m, shape.k, dtype=shape.dtype), _weight(format, shape, new)
    epilogue = _epilogue(shape, new)
    return lambda config: weight_only(x, weight, epilogue, config=config)


def _matvec(format: str, shape: Shape, chip: Chip, new):
    x, weight = new(shape.m, shape.k, dtype=shape.dtype), _weight(format, shape, new)
    epilogue = _epilogue(shape, new)
    return lambda config: matvec(x, weight, epilogue, config=config)


def _eight_bit(format: str, shape: Shape, chip: Chip, new):
    m, n, k, dtype = shape.m, shape.n, shape.k, shape.dtype
    q, w, y = (*(new(size, k, dtype=_NUMBERS[format]) for size in (m, n)), new(m, n, dtype=dtype))
    epilogue = _epilogue(shape, new)._replace(row=new(m), column=new(n))
    if format == "int8":
        apart = {"xa": new(m, MOST_APART, dtype=dtype), "wa": new(n, MOST_APART, dtype=dtype)}
        epilogue = epilogue._replace(**apart)
    return lambda config: eight_bit(q, w, y, epilogue, config=config, precise=True)


def _round_rows(format: str, shape: Shape, chip: Chip, new):
    x = new(shape.m, shape.n, dtype=shape.dtype)
    return lambda config: round_rows(x, _NUMBERS[format], None, config=config)


def _finish_product(format: str, shape: Shape, chip: Chip, new):
    sums = torch.int32 if format == "int8" else shape.dtype
    parts, y = new(1, shape.m, shape.n, dtype=sums), new(shape.m, shape.n, dtype=shape.dtype)
    epilogue = _epilogue(shape, new)
    if format == "int8":
        epilogue = epilogue._replace(row=new(shape.m), column=new(shape.n))
    return lambda config: finish(parts, y, epilogue, config=config)


def _unpack(format: str, shape: Shape, chip: Chip, new):
    weight = _weight(format, shape, new)
    return lambda config: unpack(weight, shape.dtype, config=config)


def _transpose(format: str, shape: Shape, chip: Chip, new):
    data = new(shape.n, shape.k, dtype=_NUMBERS[format])
    return lambda config: transpose(data, config=config)


def _weight(format: str, shape: Shape, new) -> QuantizedWeight:
    n, k = shape.n, shape.k
    if format != "int4":
        return QuantizedWeight(new(n, k, dtype=_NUMBERS[format]), new(n), None, format, None)
    group = default_group_size(k)
    scale, offset = (new(n, k // group, dtype=torch.bfloat16) for _ in range(2))
    return QuantizedWeight(new(n, k // 2, dtype=torch.uint8), scale, offset, format, group)


def _epilogue(shape: Shape, new) -> Epilogue:
    if not shape.r:
        return Epilogue()
    dropout = Dropout(0.1, new(1, dtype=torch.int64)) if shape.masked else NO_DROPOUT
    return Epilogue(new(shape.m, shape.r), new(shape.n, shape.r), dropout=dropout)


#: `(kernel, its launcher, the formats it serves)`; the name of its tiles ends in the format.
KERNELS = (
    ("matvec", _matvec, FORMATS),
    ("weight_only", _weight_only, FORMATS),
    ("eight_bit", _eight_bit, tuple(_NUMBERS)),
    ("round_rows", _round_rows, tuple(_NUMBERS)),
    ("finish_product", _finish_product, tuple(_NUMBERS)),
    ("unpack", _unpack, FORMATS),
    ("transpose", _transpose, tuple(_NUMBERS)),
)
