"""Products of a frozen int8 weight with rows rounded to 8 bits (`eight_bit_rows.py`).

    x Wᵀ:   q = round(x / s),         y  = (q Wqᵀ)·s·w + bias       w: the weight's row scales
    dY W:   q = round((dY ⊙ w) / s),  dX = (q Wq)·s                 Wq: the one int8 copy

The sums are exact in int32; what the rounding kept out of q is multiplied unrounded and added. What
follows a product has two ways, a compiled pass or plain torch, and `native/int8_product.c` is
product and all that follows in one. An e4m3 weight goes the same way in e4m3, here in float32 only
and with nothing kept apart.
"""

import torch

from . import native
from .device import has_int8_tiles, multiplies_int8
from .eight_bit_rows import E4M3, Rounded, e4m3_values, round_logits, round_rows
from .expanded import Expanded, fitting
from .native import address
from .products import LowRank, accumulator

_EXACT = 1024  # int8 products whose sum fp32 holds exactly: 1024·127·128 < 2²⁴


def linear(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    rounded: Rounded | None = None,
    plus: LowRank | None = None,
) -> torch.Tensor:
    """`x Wᵀ + bias + plus` for x [M, in], data int8 or e4m3 [out, in], scale fp32 [out].

    In x's dtype. `rounded`: `round_rows(x, None)`, where another product of the same x needed it
    already.
    """
    if data.dtype == E4M3:
        y = e4m3_values(x, None) @ data.float().t() * scale
        return LowRank.added_to((y if bias is None else y + bias).to(x.dtype), plus)
    rounded = rounded or round_rows(x, None)
    apart = None if rounded.apart is None else x[:, rounded.apart]
    return _product(rounded, apart, data, True, x.dtype, column=scale, bias=bias, plus=plus)


def input_gradient(
    dy: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor,
    into: torch.Tensor | None = None,
    plus: LowRank | None = None,
    logits: bool = False,
) -> torch.Tensor:
    """`dY W + plus`, in dY's dtype; added to `into` in place where it is given.

    `logits`: whether dY is the gradient of logits.
    """
    if data.dtype == E4M3:
        dx = (e4m3_values(dy, scale) @ data.float()).to(dy.dtype)
        return LowRank.added_to(dx if into is None else into.add_(dx), plus)
    rounded = round_logits(dy, scale) if logits else round_rows(dy, scale)
    apart = None
    if rounded.apart is not None:
        apart = dy[:, rounded.apart].float() * scale[rounded.apart]
    return _product(rounded, apart, data, False, dy.dtype, into=into, plus=plus)


def _product(
    rounded: Rounded,
    apart: torch.Tensor | None,
    data: torch.Tensor,
    by_output: bool,
    dtype: torch.dtype,
    *,
    column: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    into: torch.Tensor | None = None,
    plus: LowRank | None = None,
) -> torch.Tensor:
    """`v dataᵀ` (by_output) or `v data`, its columns scaled, with bias and low-rank term.

    v is the rounded tensor, whose columns `rounded.apart` are in `apart` [M, P]; it has peaks in a
    product by input only. Added to `into` in place, where it is given.
    """
    peaks = rounded.peaks
    line = None if peaks is None else data.index_select(0, peaks.at)
    fused = fitting(plus)
    y = _in_one_pass(rounded, apart, line, data, by_output, dtype, column, bias, into, fused)
    if y is not None:
        return y if plus is fused else LowRank.added_to(y, plus)
    acc = integer_product(rounded.q, data.t() if by_output else data)
    if peaks is None and apart is None:
        if into is None:
            y = restore(acc, rounded.scale, dtype, column, bias)
        else:
            y = add_restored_(into, acc, rounded.scale)
        return LowRank.added_to(y, plus)
    wide = restore(acc, rounded.scale, accumulator(dtype), column, bias)
    if peaks is not None:
        wide.addcmul_(line.to(wide.dtype), peaks.value[:, None].to(wide.dtype))
    if apart is not None:  # unrounded: a gradient times a small scale may underflow in fp16
        lines = (data[:, rounded.apart].t() if by_output else data[rounded.apart]).to(wide.dtype)
        wide.addmm_(apart.to(wide.dtype), lines if column is None else lines * column)
    y = wide.to(dtype) if into is None else into.add_(wide)
    return LowRank.added_to(y, plus)


def _in_one_pass(
    rounded, apart, line, data, by_output, dtype, column, bias, into, plus
) -> torch.Tensor | None:
    """The same by `native/int8_product.c`; None where there is no such pass for it."""
    q, (m, k) = rounded.q, rounded.q.shape
    n = data.shape[0] if by_output else data.shape[1]
    handle = native.library().handle if has_int8_tiles(q.device) else None
    if handle is None or dtype not in native.NAMES or k % 4 or 0 in (m, k, n):
        return None
    if not native.has(handle, "int8_product"):
        return None
    y = q.new_empty(m, n, dtype=dtype) if into is None else into
    column, bias, beside = _floats(column), _floats(bias), _floats(apart)
    apart, term = rounded.apart, Expanded.of(plus, dtype)
    peak = None if rounded.peaks is None else rounded.peaks.value
    q, data = q.contiguous(), data.contiguous()
    getattr(handle, f"artemis_int8_product_{native.NAMES[dtype]}")(
        address(q), address(data), address(rounded.scale), address(column), address(bias),
        address(apart), address(beside), 0 if apart is None else apart.numel(),
        address(peak), address(line), *term.arguments,
        address(y), m, k, n, by_output, into is not None, torch.get_num_threads(),
    )  # fmt: skip
    return y


def _floats(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def integer_product(q: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """`q w` for int8 [M, K] and [K, N] of any strides: exact int32 sums."""
    if 0 in (*q.shape, w.shape[1]):
        return q.new_zeros(q.shape[0], w.shape[1], dtype=torch.int32)
    if q.shape[1] == 1:  # `_int_mm` may return memory that it never wrote
        return q.int() * w.int()
    if multiplies_int8(q.device):
        return torch._int_mm(q, w)
    acc = q.new_zeros(q.shape[0], w.shape[1], dtype=torch.int32)
    for left, right in zip(q.split(_EXACT, 1), w.split(_EXACT, 0), strict=True):
        acc += torch.mm(left.float(), right.float()).to(torch.int32)
    return acc


def add_restored_(y: torch.Tensor, acc: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """`y += acc·row[:, None]` in place, for row-major y [M, N], int32 acc and fp32 row [M]."""
    library = native.library_for(y)
    if library is None:
        return y.add_(acc.float().mul_(row[:, None]))
    getattr(library, f"artemis_add_restored_{native.NAMES[y.dtype]}")(
        acc.data_ptr(), row.data_ptr(), y.data_ptr(), *acc.shape, torch.get_num_threads()
    )
    return y


def restore(
    acc: torch.Tensor,
    row: torch.Tensor,
    dtype: torch.dtype,
    column: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`acc·row[:, None]·column + bias` for int32 acc [M, N], rounded once to `dtype`.

    row fp32 [M]; column fp32 [N] or None; bias [N] or None, only with a column.
    """
    bias = None if bias is None else bias.float().contiguous()
    library = native.library().handle if acc.device.type == "cpu" else None
    if library is None or dtype not in native.NAMES:
        y = acc.float() * row[:, None]
        y = y if column is None else y * column
        return (y if bias is None else y + bias).to(dtype)
    y = acc.new_empty(acc.shape, dtype=dtype)
    column = None if column is None else column.contiguous()
    pointers = (None if part is None else part.data_ptr() for part in (column, bias))
    getattr(library, f"artemis_restore_{native.NAMES[dtype]}")(
        acc.data_ptr(), row.data_ptr(), *pointers, y.data_ptr(), *acc.shape,
        torch.get_num_threads(),
    )  # fmt: skip
    return y
