"""The steps of fused paths over a base weight, packed or not: each picks its launches.

A strategy's last word says how a packed weight is multiplied (`core.packed_choice`):

    weight_only   the packed tiles, dequantized on their way into the product (forward only); of
                  few rows without tensor cores (`ops.few_rows`), which serves tensors, too
    dense         a dense copy in x's dtype, made by one pass, then what a tensor would get
    int8, fp8     rows of x (or of dY ⊙ row scale) rounded to 8 bits, 8-bit tensor cores
    int8_logits   the same, dY rounded as the gradient of logits is (`round_logits`)

For dX tensor cores want the weight's 8-bit numbers along `out`. They are transposed at the call
(2·N·K bytes of traffic: on an H200 about 1/30 of the product's time at 8,192 rows) into a buffer
that is freed after it, rather than held twice: the base stays at one byte a number, with one scale
a row, and dX is that of `core.eight_bit`.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch.nn import functional

from ...core import packed_choice, tuning
from ...core.device import Chip
from ...core.quantized import QuantizedWeight
from ...core.tiling import Shape
from ..few_rows.matvec import matvec
from ..low_rank import steps
from ..low_rank.arguments import NO_DROPOUT, UNSCALED, Dropout, Scale
from .columns_apart import weights_apart
from .eight_bit import eight_bit
from .epilogue import Epilogue, finish
from .round_logits import round_logits
from .round_rows import Rounded, round_rows
from .transpose import transpose
from .unpack import unpack
from .weight_only import weight_only

EIGHT_BIT = ("int8", "fp8")
_LONG_SUM = 8192  # from here on fp8 sums are kept precise in the forward too


class Packed(NamedTuple):
    """A quantized weight [out, in], or its transpose, and how it is multiplied."""

    weight: QuantizedWeight
    how: str  # weight_only, dense, int8, fp8
    vendor: bool  # 8-bit products by torch
    transposed: bool = False

    def t(self) -> "Packed":
        return self._replace(transposed=not self.transposed)


def of(
    weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, strategy: str
) -> Packed:
    """The base that an operator's tensors and strategy stand for."""
    how, makes_logits = packed_choice.told_by(strategy)
    packed = QuantizedWeight.of_parts(weight, scale, offset, makes_logits=makes_logits)
    return Packed(packed, how, "vendor" in strategy)


def dense(weight: torch.Tensor | Packed, dtype: torch.dtype, chip: Chip) -> torch.Tensor:
    """The base as a tensor, for thin products with it; a copy of a packed one."""
    if isinstance(weight, torch.Tensor):
        return weight
    N, K = weight.weight.shape
    config = tuning.config(f"unpack_{weight.weight.format}", Shape(1, N, K, dtype=dtype), chip)
    copy = unpack(weight.weight, dtype, config=config)
    return copy.t() if weight.transposed else copy


def rounded_once(
    x: torch.Tensor, weights: Iterable[torch.Tensor | Packed], chip: Chip
) -> dict[str, Rounded]:
    """x in the 8 bits that products by these weights take, by their names."""
    packed = (weight for weight in weights if isinstance(weight, Packed) and x.numel())
    each = {weight.how: weight for weight in packed if weight.how in EIGHT_BIT}
    return {how: _rounded(x, weight, chip) for how, weight in each.items()}


def product(
    x: torch.Tensor,
    weight: torch.Tensor | Packed,
    bias: torch.Tensor | None,
    chip: Chip,
    *,
    rounded: Mapping[str, Rounded] | None = None,
) -> torch.Tensor:
    """`x Wᵀ + bias` [M, N] in x's dtype; by the vendor where the weight is, or becomes, dense.

    `rounded`: what `rounded_once` made of x.
    """
    if isinstance(weight, Packed) and not _becomes_dense(weight):
        return _packed(x, weight, Epilogue(bias=bias), chip, rounded)
    copy = dense(weight, x.dtype, chip)
    return functional.linear(x, copy, None if bias is None else bias.to(x.dtype))


def add_product(
    x: torch.Tensor, weight: torch.Tensor | Packed, into: torch.Tensor, chip: Chip
) -> None:
    """`into += x Wᵀ` [M, N], rounded once."""
    if isinstance(weight, Packed) and not _becomes_dense(weight):
        _packed(x, weight, Epilogue(residual=into), chip)
    else:
        into.addmm_(x, dense(weight, x.dtype, chip).t())


def expanded(
    x: torch.Tensor,
    weight: torch.Tensor | Packed,
    s: torch.Tensor,
    b: torch.Tensor,
    chip: Chip,
    *,
    vendor: bool,
    bias: torch.Tensor | None = None,
    bias_low: torch.Tensor | None = None,
    scale: Scale = UNSCALED,
    dropout: Dropout = NO_DROPOUT,
    rounded: Mapping[str, Rounded] | None = None,
) -> torch.Tensor:
    """`x Wᵀ + bias + s·(mask·(S Bᵀ) + bias_low)` over any base; `rounded` as in `product`."""
    epilogue = Epilogue(s, b, bias, bias_low, scale, dropout)
    if isinstance(weight, Packed) and not _becomes_dense(weight):
        return _packed(x, weight, epilogue, chip, rounded)
    if isinstance(weight, torch.Tensor) and weight.stride(1) == 1 and not vendor:
        shape = _shape(x, weight.shape[0], epilogue)
        if tuning.walks_rows(shape):
            config = tuning.config("matvec_tensor", shape, chip)
            return matvec(x, weight, epilogue, config=config)
    return steps.expanded(
        x, dense(weight, x.dtype, chip), s, b, chip, vendor=vendor, bias=bias, bias_low=bias_low,
        scale=scale, dropout=dropout,
    )  # fmt: skip


def _becomes_dense(weight: Packed) -> bool:
    """Packed tiles lie along `in`; a product along `out` takes them from a dense copy."""
    return weight.how == "dense" or (weight.how == "weight_only" and weight.transposed)


def _rounded(x: torch.Tensor, weight: Packed, chip: Chip) -> Rounded:
    """x as the product by this weight takes it: dY ⊙ its row scales, if it is transposed."""
    packed, shape = weight.weight, Shape(*x.shape, dtype=x.dtype)
    if weight.transposed and packed.makes_logits:
        config = tuning.config(f"round_logits_{weight.how}", shape, chip)
        return round_logits(x, packed.scale, config=config)
    factor = packed.scale if weight.transposed else None
    config = tuning.config(f"round_rows_{weight.how}", shape, chip)
    return round_rows(x, packed.data.dtype, factor, config=config)


def _packed(
    x: torch.Tensor,
    weight: Packed,
    epilogue: Epilogue,
    chip: Chip,
    rounded_rows: Mapping[str, Rounded] | None = None,
) -> torch.Tensor:
    packed = weight.weight
    if weight.how == "weight_only":
        shape = _shape(x, packed.shape[0], epilogue)
        if tuning.walks_rows(shape):
            config = tuning.config(f"matvec_{packed.format}", shape, chip)
            return matvec(x, packed, epilogue, config=config)
        config = tuning.config(f"weight_only_{packed.format}", shape, chip)
        return weight_only(x, packed, epilogue, config=config)
    N = packed.shape[1 if weight.transposed else 0]
    y = x.new_empty(x.shape[0], N) if epilogue.residual is None else epilogue.residual
    if not y.numel():
        return y
    rounded = (rounded_rows or {}).get(weight.how)
    if rounded is None:
        rounded = _rounded(x, weight, chip)
    data, column = packed.data, packed.scale
    if weight.transposed:
        data, column = _along_out(packed, chip), None
    wa = None
    if rounded.apart is not None:
        wa = weights_apart(
            packed.data, packed.scale, rounded.columns, x.dtype, transposed=weight.transposed
        )
    epilogue = epilogue._replace(
        row=rounded.scale, column=column, xa=rounded.apart, wa=wa, peaks=rounded.peaks,
        lines=None if rounded.peaks is None else packed.data,
    )  # fmt: skip
    precise = weight.transposed or x.shape[1] > _LONG_SUM
    if weight.vendor:
        return _by_torch(rounded.q, data, y, epilogue, chip, precise)
    config = tuning.config(f"eight_bit_{weight.how}", _shape(x, N, epilogue), chip)
    eight_bit(rounded.q, data, y, epilogue, config=config, precise=precise)
    return y


def _along_out(packed: QuantizedWeight, chip: Chip) -> torch.Tensor:
    """The weight's numbers [in, out] for dX; AMD's tensor cores take them as they lie."""
    view = packed.data.t()
    if chip.backend == "hip" or view.is_contiguous():
        return view
    config = tuning.config(f"transpose_{packed.format}", Shape(1, *packed.shape), chip)
    return transpose(packed.data, config=config)


def _by_torch(
    q: torch.Tensor, data: torch.Tensor, y: torch.Tensor, epilogue: Epilogue, chip: Chip,
    precise: bool,
) -> torch.Tensor:  # fmt: skip
    """torch's 8-bit product of q [M, K] and data [N, K], then one pass for what is left."""
    M, N = y.shape
    shape = Shape(M, N, r=epilogue.rank, dtype=y.dtype, masked=epilogue.dropout.p > 0)
    config = tuning.config(f"finish_product_{_format(q)}", shape, chip)
    if q.dtype == torch.int8:
        finish(torch._int_mm(q, data.t())[None], y, epilogue, config=config)
        return y
    column = epilogue.column
    column = torch.ones_like(epilogue.row[:1]).expand(N) if column is None else column
    parts = torch._scaled_mm(
        q, data.t(), epilogue.row[:, None], column[None].contiguous(), out_dtype=y.dtype,
        use_fast_accum=not precise,
    )  # fmt: skip
    left = epilogue._replace(row=None, column=None)
    if left.s is None and left.bias is None and left.residual is None:
        return parts
    finish(parts[None], y, left, config=config)
    return y


def _format(q: torch.Tensor) -> str:
    return "int8" if q.dtype == torch.int8 else "fp8"


def _shape(x: torch.Tensor, out_features: int, epilogue: Epilogue) -> Shape:
    masked = epilogue.dropout.p > 0
    return Shape(x.shape[0], out_features, x.shape[1], epilogue.rank, x.dtype, masked)
