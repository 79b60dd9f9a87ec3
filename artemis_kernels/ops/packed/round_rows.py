"""Rows rounded to 8 bits, each by its own scale, and the columns that are kept apart from that.

    v = x ⊙ kept      scale = max|v| / largest      q = round(v / scale)

| name    | shape  | dtype            | strides    |
| x       | [M, K] | fp16, bf16, fp32 | any        |
| kept    | [K]    | fp32             | contiguous |
| columns | [A]    | int64            | contiguous |
| counts  | [A]    | int8, 0 or 1     | contiguous |
| q       | [M, K] | int8 or e4m3     | contiguous |
| scale   | [M]    | fp32             | contiguous |
| apart   | [M, A] | x's              | contiguous |

`kept` is the factor, for int8 with zeros at the columns that count (`columns_apart`), which are
copied to `apart`. e4m3 has an exponent of its own and keeps nothing apart.

`largest` is 127 or 448; both round to nearest, ties to even, int8 as `core.eight_bit` does. A row
that holds inf or nan gets q = 0 and scale nan, one too small to be scaled q = 0 and scale 0.
Bytes: x once, q once, where a program holds whole rows; else x twice.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...core.eight_bit_rows import Peaks
from ...core.tiling import Config, cdiv
from ..low_rank.arguments import contiguous
from .columns_apart import column_max, set_apart
from .epilogue import MOST_APART

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST = {torch.int8: 1e-36, torch.float8_e4m3fn: 4e-36}  # largest / smallest must be finite
_INFINITE = tl.constexpr(float("inf"))
# Added to a small fp32 number and taken away again, it rounds to nearest, ties to even.
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2²³
_SUBNORMAL_ROUNDER = tl.constexpr(24576.0)  # the same in steps of 2⁻⁹


class Rounded(NamedTuple):
    """`v ≈ q·scale` outside `columns`, whose x stands in `apart` (0 where one does not count).

    And outside the `peaks`, one number of each row, where dY is the gradient of logits.
    """

    q: torch.Tensor  # int8 or e4m3 [M, K]
    scale: torch.Tensor  # fp32 [M]
    apart: torch.Tensor | None = None  # [M, A], x's dtype
    columns: torch.Tensor | None = None  # int64 [A]
    peaks: Peaks | None = None


@triton.jit
def _scaled_columns(x_ptrs, kept_ptr, offs_k, mask_m, K):
    mask_k = offs_k < K
    v = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0).to(tl.float32)
    if kept_ptr is not None:
        kept = tl.load(kept_ptr + offs_k, mask=mask_k, other=0.0)
        # A column apart has 0 here, and whatever it holds must not reach q.
        v = tl.where((kept == 0.0)[None, :], 0.0, v * kept[None, :])
    return v


@triton.jit
def _size(v):
    """|v|, infinite where v is no number."""
    size = tl.abs(v)
    return tl.where(size < _INFINITE, size, _INFINITE)  # false for nan


@triton.jit
def _store_rounded(
    v, q_ptrs, usable, inverse, largest, mask_m, offs_k, K, INTEGER: tl.constexpr
):  # fmt: skip
    v = tl.where(usable[:, None], v * inverse[:, None], 0.0)
    v = tl.minimum(tl.maximum(v, -largest), largest)
    v = v + _ROUNDER - _ROUNDER if INTEGER else _nearest_e4m3(v)
    mask = mask_m[:, None] & (offs_k < K)[None, :]
    tl.store(q_ptrs, v.to(q_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _nearest_e4m3(v):
    """The e4m3 number nearest to v, ties to even, in fp32: its cast is exact, whoever does it.

    (Triton's interpreter loses the carry where a mantissa of ones is rounded up.)
    """
    bits = v.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # three bits of mantissa are kept
    subnormal = v + _SUBNORMAL_ROUNDER - _SUBNORMAL_ROUNDER
    return tl.where(tl.abs(v) < 0.015625, subnormal, normal.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["M"])
def _round_rows(
    x_ptr, kept_ptr, columns_ptr, counts_ptr, q_ptr, scale_ptr, apart_ptr,
    M, K, A,
    stride_xm, stride_xk,
    largest, smallest,
    INTEGER: tl.constexpr, MOST: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    largest = tl.cast(largest, tl.float32)
    if apart_ptr is not None:
        _copy_columns(
            x_ptr, columns_ptr, counts_ptr, apart_ptr, offs_m, mask_m, A, stride_xm, stride_xk, MOST
        )  # fmt: skip

    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    q_ptrs = q_ptr + offs_m[:, None] * K + offs_k[None, :]
    if WHOLE:
        v = _scaled_columns(x_ptrs, kept_ptr, offs_k, mask_m, K)
        size = _size(v)
    else:
        size = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)  # one reduction, behind the loop
        for k in range(0, K, BLOCK_K):
            ahead = x_ptrs + tl.cast(k, tl.int64) * stride_xk
            v = _scaled_columns(ahead, kept_ptr, k + offs_k, mask_m, K)
            size = tl.maximum(size, _size(v))

    top = tl.max(size, 1)
    finite = top < _INFINITE
    usable = finite & (top > tl.cast(smallest, tl.float32))
    inverse = tl.where(usable, largest / tl.where(usable, top, 1.0), 0.0)
    scale = tl.where(usable, top / largest, tl.where(finite, 0.0, float("nan")))
    tl.store(scale_ptr + offs_m, scale, mask=mask_m)
    if WHOLE:
        _store_rounded(v, q_ptrs, usable, inverse, largest, mask_m, offs_k, K, INTEGER)
    else:
        for k in range(0, K, BLOCK_K):
            ahead = x_ptrs + tl.cast(k, tl.int64) * stride_xk
            v = _scaled_columns(ahead, kept_ptr, k + offs_k, mask_m, K)
            _store_rounded(
                v, q_ptrs + k, usable, inverse, largest, mask_m, k + offs_k, K, INTEGER
            )  # fmt: skip


@triton.jit
def _copy_columns(
    x_ptr, columns_ptr, counts_ptr, apart_ptr, offs_m, mask_m, A, stride_xm, stride_xk,
    MOST: tl.constexpr,
):  # fmt: skip
    """x at the columns that count, 0 at the others."""
    offs_a = tl.arange(0, MOST)
    mask_a = offs_a < A
    columns = tl.load(columns_ptr + offs_a, mask=mask_a, other=0)
    counts = tl.load(counts_ptr + offs_a, mask=mask_a, other=0) != 0
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + columns[None, :] * stride_xk
    x = tl.load(x_ptrs, mask=mask_m[:, None] & counts[None, :], other=0.0)
    mask = mask_m[:, None] & mask_a[None, :]
    tl.store(apart_ptr + offs_m[:, None] * A + offs_a[None, :], x, mask=mask)


def round_rows(
    x: torch.Tensor, dtype: torch.dtype, factor: torch.Tensor | None, *, config: Config
) -> Rounded:
    """Round `x ⊙ factor` [M, K], M > 0, to int8 (columns apart) or e4m3."""
    (M, K), A, columns, counts, apart = x.shape, 0, None, None, None
    kept = contiguous(factor)
    if dtype == torch.int8 and K > 1:
        kept, columns, counts = set_apart(column_max(x, config=config), kept)
        A = columns.shape[0]
        apart = x.new_empty(M, A)
    q = x.new_empty(M, K, dtype=dtype)
    scale = x.new_empty(M, dtype=torch.float32)
    _round_rows[(cdiv(M, config.block_m),)](
        x, kept, columns, counts, q, scale, apart,
        M, K, A,
        *x.stride(),
        LARGEST[dtype], SMALLEST[dtype],
        dtype == torch.int8, MOST_APART, config.block_k >= K, config.block_m, config.block_k,
        num_warps=config.warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return Rounded(q, scale, apart, columns)
