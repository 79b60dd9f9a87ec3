"""Rows rounded to 8 bits, each by its own scale: what stands before a product in 8 bits.

    v = x ⊙ factor     q = round(v / s)     s = max |v| / 127, of each row

A few columns of x may be tens of times larger than the rest (Dettmers et al., arXiv 2208.07339):
one row scale would then round all others to nothing, so columns whose largest value exceeds
`APART` medians are kept out of q, to be multiplied unrounded.

The gradient of logits is p − 1 at the target and p elsewhere, over a whole vocabulary: one large
number, and thousands that only together weigh as much. The largest of each row, its peak, is kept
out of q, and what rounding leaves of a number is added to another one. Rounding each to the nearest
would take small probabilities to zero, in all rows alike, and dX would miss their sum.

There are two ways, a compiled pass or plain torch, which agree to the last bit.
"""

import ctypes
from typing import NamedTuple

import torch
from torch.nn import functional

from . import native

E4M3 = torch.float8_e4m3fn
APART = 4.0  # times the median column's largest value
FEWEST_PER_COLUMN_APART = 64  # at most one column in so many, at least one
_TINIEST = 1e-36  # rows below are zeros: 127 / tiny would overflow
_ROWS_OF_A_PART = 16  # at least so many share a partial maximum of the columns
_LANES = 64  # a logit's rounding error goes to the one so many columns on


class Peaks(NamedTuple):
    """One number of each row that is not in q."""

    value: torch.Tensor  # fp32 [M]
    at: torch.Tensor  # int64 [M], its column


class Rounded(NamedTuple):
    """`v ≈ q·scale` outside the columns `apart` and the `peaks`, for v = x ⊙ factor."""

    q: torch.Tensor  # int8 [M, K]
    scale: torch.Tensor  # fp32 [M]; nan where the row holds inf or nan
    apart: torch.Tensor | None  # int64 [P], columns of x that are not in q
    peaks: Peaks | None = None


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
        x.data_ptr(), None if factor is None else factor.data_ptr(), parts.data_ptr(), count,
        APART, apart.data_ptr(), most, ctypes.byref(found), kept.data_ptr(), q.data_ptr(),
        scale.data_ptr(), m, k, threads,
    )  # fmt: skip
    if found.value < 0:
        return q, scale, None, parts[0].view(torch.float32)
    return q, scale, apart[: found.value] if found.value else None, None


def round_logits(dy: torch.Tensor, factor: torch.Tensor) -> Rounded:
    """Round `dy ⊙ factor` to 8 bits, row by row, for the gradient dy [M, K] of logits.

    The largest of a row is its peak; of the rest, what rounding leaves of a number is added to the
    one `_LANES` columns on.
    """
    (m, k), dy = dy.shape, dy.contiguous()
    if not dy.numel():
        return round_rows(dy, factor)
    library = native.library_for(dy)
    if library is None:
        return _round_logits(dy.float() * factor)
    q, factor = dy.new_empty(m, k, dtype=torch.int8), factor.contiguous()
    scale, value = dy.new_empty(2, m, dtype=torch.float32)
    at = dy.new_empty(m, dtype=torch.int64)
    getattr(library, f"artemis_round_logits_{native.NAMES[dy.dtype]}")(
        dy.data_ptr(), factor.data_ptr(), q.data_ptr(), scale.data_ptr(), value.data_ptr(),
        at.data_ptr(), m, k, torch.get_num_threads(),
    )  # fmt: skip
    return Rounded(q, scale, None, Peaks(value, at))


def _round_logits(v: torch.Tensor) -> Rounded:
    (m, k), at = v.shape, v.abs().argmax(1, keepdim=True)
    value = v.gather(1, at)
    rest = v.scatter(1, at, 0.0)
    largest = rest.abs().amax(1, keepdim=True)
    finite = torch.isfinite(value)
    usable = finite & (largest > _TINIEST)
    inverse = torch.where(usable, torch.full_like(largest, 126.0) / largest, 0.0)
    scale = torch.where(usable, largest / 126.0, torch.where(finite, 0.0, torch.nan))
    wanted = torch.where(usable, rest * inverse, 0.0)
    wanted = functional.pad(wanted, (0, -k % _LANES)).view(m, -1, _LANES)
    q, left = torch.empty_like(wanted, dtype=torch.int8), wanted.new_zeros(m, _LANES)
    for i in range(wanted.shape[1]):
        block = wanted[:, i] + left
        nearest = block.round()
        left = block - nearest
        q[:, i] = nearest
    peaks = Peaks(torch.where(finite, value, 0.0)[:, 0], at[:, 0])
    return Rounded(q.view(m, -1)[:, :k].contiguous(), scale[:, 0], None, peaks)


def _round_rows(x: torch.Tensor, factor: torch.Tensor | None):
    v = x.float() if factor is None else x.float() * factor
    largest = v.abs().amax(1, keepdim=True) if v.shape[1] else v.new_zeros(v.shape[0], 1)
    finite = torch.isfinite(largest)
    usable = finite & (largest > _TINIEST)
    inverse = torch.where(usable, torch.full_like(largest, 127.0) / largest, 0.0)
    scale = torch.where(usable, largest / 127.0, torch.where(finite, 0.0, torch.nan))
    return torch.where(usable, v * inverse, 0.0).round_().to(torch.int8), scale[:, 0]


def e4m3_values(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
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
