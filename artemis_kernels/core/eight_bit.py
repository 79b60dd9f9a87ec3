"""Products of a frozen int8 weight with rows rounded to 8 bits, each row by its own scale.

    x Wᵀ:   q = round(x / s),         y  = (q Wqᵀ)·s·w + bias       w: the weight's row scales
    dY W:   q = round((dY ⊙ w) / s),  dX = (q Wq)·s                 Wq: the one int8 copy

The sums are exact in int32. A few columns of x may be tens of times larger than the rest (Dettmers
et al., arXiv 2208.07339): one row scale would then round all others to nothing, so columns whose
largest value exceeds `APART` medians are kept out of q and multiplied unrounded. Rounding and
what follows a product have two ways, a compiled pass or plain torch, which agree to the last bit;
`native/int8_product.c` is product and all that follows in one. An e4m3 weight goes the same way in
e4m3, here in float32 only and with no column apart.
"""

import ctypes
from typing import NamedTuple

import torch

from . import native
from .device import has_int8_tiles, multiplies_int8
from .products import LowRank

E4M3 = torch.float8_e4m3fn
APART = 4.0  # times the median column's largest value
FEWEST_PER_COLUMN_APART = 64  # at most one column in so many, at least one
_EXACT = 1024  # int8 products whose sum fp32 holds exactly: 1024·127·128 < 2²⁴
_TINIEST = 1e-36  # rows below are zeros: 127 / tiny would overflow
_ROWS_OF_A_PART = 16  # at least so many share a partial maximum of the columns
_MOST_EXPANDED = 24  # ranks that the product's own pass adds; beyond, BLAS is faster


class Rounded(NamedTuple):
    """`v ≈ q·scale` outside the columns `apart`, for v = x ⊙ factor."""

    q: torch.Tensor  # int8 [M, K]
    scale: torch.Tensor  # fp32 [M]; nan where the row holds inf or nan
    apart: torch.Tensor | None  # int64 [P], columns of x that are not in q


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
        y = _e4m3_values(x, None) @ data.float().t() * scale
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
) -> torch.Tensor:
    """`dY W + plus`, in dY's dtype; added to `into` in place where it is given."""
    if data.dtype == E4M3:
        dx = (_e4m3_values(dy, scale) @ data.float()).to(dy.dtype)
        return LowRank.added_to(dx if into is None else into.add_(dx), plus)
    rounded = round_rows(dy, scale)
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

    v is the rounded tensor, whose columns `rounded.apart` are in `apart` [M, P]. Added to `into`
    in place, where it is given.
    """
    fused = plus if plus is not None and plus.rank <= _MOST_EXPANDED else None
    y = _in_one_pass(rounded, apart, data, by_output, dtype, column, bias, into, fused)
    if y is not None:
        return y if plus is fused else LowRank.added_to(y, plus)
    acc = integer_product(rounded.q, data.t() if by_output else data)
    if into is None:
        y = restore(acc, rounded.scale, dtype, column, bias)
    else:
        y = add_restored_(into, acc, rounded.scale)
    if apart is not None:
        lines = (data[:, rounded.apart].t() if by_output else data[rounded.apart]).float()
        lines = lines if column is None else lines * column
        y.addmm_(apart.to(dtype), lines.to(dtype))
    return LowRank.added_to(y, plus)


def _in_one_pass(
    rounded, apart, data, by_output, dtype, column, bias, into, plus
) -> torch.Tensor | None:
    """The same by `native/int8_product.c`; None where there is no such pass for it."""
    q, (m, k) = rounded.q, rounded.q.shape
    n = data.shape[0] if by_output else data.shape[1]
    handle = native.library().handle if has_int8_tiles(q.device) else None
    if handle is None or dtype not in native.NAMES or k % 4 or 0 in (m, k, n):
        return None
    if not native.has_int8_product(handle):
        return None
    y = q.new_empty(m, n, dtype=dtype) if into is None else into
    column, bias, beside = _floats(column), _floats(bias), _floats(apart)
    apart, s, g, alpha = rounded.apart, None, None, 1.0
    if plus is not None:
        s, g, alpha = plus.s.to(dtype), plus.g, plus.alpha
        s = s if s.stride(1) == 1 else s.contiguous()
        g = g if g.dtype in native.NAMES else g.float()
    q, data = q.contiguous(), data.contiguous()
    getattr(handle, f"artemis_int8_product_{native.NAMES[dtype]}")(
        q.data_ptr(), data.data_ptr(), rounded.scale.data_ptr(), _address(column), _address(bias),
        _address(apart), _address(beside), 0 if apart is None else apart.numel(),
        _address(s), 0 if s is None else s.stride(0),
        _address(g), *((0, 0, 0) if g is None else (*g.stride(), g.dtype == torch.bfloat16)),
        0 if plus is None else plus.rank, alpha,
        y.data_ptr(), m, k, n, by_output, into is not None, torch.get_num_threads(),
    )  # fmt: skip
    return y


def _floats(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def round_rows(x: torch.Tensor, factor: torch.Tensor | None) -> Rounded:
    """Round `x ⊙ factor` to 8 bits, row by row; x [M, K], factor fp32 [K] or None (ones)."""
    x = x.contiguous()
    library = native.library_for(x) if x.numel() else None
    if library is None:
        apart = outliers(_column_max(x, factor))
        return Rounded(*_round_rows(x, _without(x, factor, apart)), apart)
    factor = None if factor is None else factor.contiguous()
    q, scale, apart, largest = _round_in_one_pass(library, x, factor, _most_apart(x.shape[1]))
    if largest is not None:  # more stand out than may be kept apart
        apart = outliers(largest)
        q, scale, _, _ = _round_in_one_pass(library, x, _without(x, factor, apart), 0)
    return Rounded(q, scale, apart)


def _without(
    x: torch.Tensor, factor: torch.Tensor | None, apart: torch.Tensor | None
) -> torch.Tensor | None:
    """`factor` with zeros for the columns `apart`."""
    if apart is None:
        return factor
    factor = x.new_ones(x.shape[1], dtype=torch.float32) if factor is None else factor.clone()
    factor[apart] = 0.0
    return factor


def _round_in_one_pass(library, x: torch.Tensor, factor: torch.Tensor | None, most: int):
    """q, scale, the columns apart or None; and, where they exceed `most`, the largest values."""
    (m, k), threads = x.shape, torch.get_num_threads()
    count = min(-(-m // _ROWS_OF_A_PART), 2 * threads)
    q = x.new_empty(m, k, dtype=torch.int8)
    scale, kept = x.new_empty(m, dtype=torch.float32), x.new_empty(k, dtype=torch.float32)
    parts, apart = x.new_empty(count, k, dtype=torch.int32), x.new_empty(most, dtype=torch.int64)
    found = ctypes.c_int64()
    getattr(library, f"artemis_round_{native.NAMES[x.dtype]}")(
        x.data_ptr(), _address(factor), parts.data_ptr(), count, APART, apart.data_ptr(), most,
        ctypes.byref(found), kept.data_ptr(), q.data_ptr(), scale.data_ptr(), m, k, threads,
    )  # fmt: skip
    if found.value < 0:
        return q, scale, None, parts[0].view(torch.float32)
    return q, scale, apart[: found.value] if found.value else None, None


def _round_rows(x: torch.Tensor, factor: torch.Tensor | None):
    v = x.float() if factor is None else x.float() * factor
    largest = v.abs().amax(1, keepdim=True) if v.shape[1] else v.new_zeros(v.shape[0], 1)
    finite = torch.isfinite(largest)
    usable = finite & (largest > _TINIEST)
    inverse = torch.where(usable, torch.full_like(largest, 127.0) / largest, 0.0)
    scale = torch.where(usable, largest / 127.0, torch.where(finite, 0.0, torch.nan))
    return torch.where(usable, v * inverse, 0.0).round_().to(torch.int8), scale[:, 0]


def _e4m3_values(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """`x ⊙ factor` rounded row by row to e4m3, in fp32: what a GPU's rounding stands for.

    An exponent of its own keeps small features beside huge ones: no column is kept apart.
    """
    v = x.float() if factor is None else x.float() * factor
    largest = v.abs().amax(1, keepdim=True) if v.shape[1] else v.new_zeros(v.shape[0], 1)
    finite = torch.isfinite(largest)
    usable = finite & (largest > 4 * _TINIEST)
    inverse = torch.where(usable, 448.0 / largest, 0.0)
    scale = torch.where(usable, largest / 448.0, torch.where(finite, 0.0, torch.nan))
    codes = torch.where(usable, v * inverse, 0.0).clamp_(-448.0, 448.0).to(E4M3)
    return codes.float() * scale


def outliers(largest: torch.Tensor) -> torch.Tensor | None:
    """Columns to be kept apart, given the largest magnitude [K] of each; None for none."""
    if largest.numel() < 2:
        return None
    above = (largest > APART * largest.nanmedian()).nonzero()[:, 0]
    if not above.numel():
        return None
    most = _most_apart(largest.numel())
    if above.numel() > most:
        above = above[largest[above].topk(most).indices]
    return above


def _most_apart(columns: int) -> int:
    return max(1, columns // FEWEST_PER_COLUMN_APART)


def _column_max(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """max |x ⊙ factor| over rows, fp32 [K]; nan where a column holds one."""
    if not x.shape[0]:
        return x.new_zeros(x.shape[1], dtype=torch.float32)
    largest = x.abs().amax(0).float()
    return largest if factor is None else largest * factor.abs()


def integer_product(q: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """`q w` for int8 [M, K] and [K, N] of any strides: exact int32 sums."""
    if 0 in (*q.shape, w.shape[1]):
        return q.new_zeros(q.shape[0], w.shape[1], dtype=torch.int32)
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
