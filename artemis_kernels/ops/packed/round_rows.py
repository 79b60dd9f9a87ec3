"""Rows rounded to 8 bits, each by its own scale, and the columns that are kept apart from that.

    v = x ⊙ factor      scale = max|v| / largest      q = round(v / scale)

| name   | shape  | dtype            | strides    |
| x      | [M, K] | fp16, bf16, fp32 | any        |
| factor | [K]    | fp32             | contiguous |
| q      | [M, K] | int8 or e4m3     | contiguous |
| scale  | [M]    | fp32             | contiguous |
| columns| [P, K] | fp32, max \\|x\\| over P ranges of rows | contiguous |

`largest` is 127 or 448; both round to nearest, ties to even, int8 as `core.eight_bit` does. A row
that holds inf or nan gets q = 0 and scale nan, one too small to be scaled q = 0 and scale 0.
Bytes: x twice (the second time from the cache), q once.

int8's even steps lose small features beside a few huge ones (Dettmers et al., arXiv 2208.07339), so
columns above four medians are kept apart. Here their number is fixed by the shape (K/64, at most
16: one step of a dot in the epilogue), and what does not stand out is taken back by a zero: nothing
is read back from the device. e4m3 has an exponent of its own and keeps nothing apart.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...core.eight_bit_rows import APART, FEWEST_PER_COLUMN_APART, Peaks
from ...core.tiling import Config
from .epilogue import MOST_APART

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST = {torch.int8: 1e-36, torch.float8_e4m3fn: 4e-36}  # largest / smallest must be finite
_FP32_MAX = tl.constexpr(3.4028234663852886e38)
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
def _scaled_columns(x_ptrs, factor_ptr, offs_k, mask_m, K):
    mask_k = offs_k < K
    v = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0).to(tl.float32)
    if factor_ptr is not None:
        factor = tl.load(factor_ptr + offs_k, mask=mask_k, other=0.0)
        # A column apart has factor 0, and whatever it holds must not reach q.
        v = tl.where((factor == 0.0)[None, :], 0.0, v * factor[None, :])
    return v


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
    x_ptr, factor_ptr, q_ptr, scale_ptr,
    M, K,
    stride_xm, stride_xk,
    largest, smallest,
    INTEGER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    largest = tl.cast(largest, tl.float32)

    top = tl.zeros([BLOCK_M], tl.float32)
    broken = tl.zeros([BLOCK_M], tl.int32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        size = tl.abs(_scaled_columns(x_ptrs, factor_ptr, offs_k, mask_m, K))
        finite = size <= _FP32_MAX  # false for nan
        top = tl.maximum(top, tl.max(tl.where(finite, size, 0.0), 1))
        broken = tl.maximum(broken, tl.max(tl.where(finite, 0, 1), 1))

    usable = (broken == 0) & (top > tl.cast(smallest, tl.float32))
    inverse = tl.where(usable, largest / tl.where(usable, top, 1.0), 0.0)
    scale = tl.where(usable, top / largest, tl.where(broken == 0, 0.0, float("nan")))
    tl.store(scale_ptr + offs_m, scale, mask=mask_m)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        v = _scaled_columns(x_ptrs, factor_ptr, offs_k, mask_m, K)
        v = tl.where(usable[:, None], v * inverse[:, None], 0.0)
        v = tl.minimum(tl.maximum(v, -largest), largest)
        v = v + _ROUNDER - _ROUNDER if INTEGER else _nearest_e4m3(v)
        q_ptrs = q_ptr + offs_m[:, None] * K + offs_k[None, :]
        mask = mask_m[:, None] & (offs_k < K)[None, :]
        tl.store(q_ptrs, v.to(q_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _column_max(
    x_ptr, out_ptr,
    M, K,
    stride_xm, stride_xk,
    SPLIT_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid_m = tl.program_id(1)
    chunk = tl.cdiv(tl.cdiv(M, BLOCK_M), SPLIT_M) * BLOCK_M
    start = pid_m.to(tl.int64) * chunk
    end = min(M, start + chunk)
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
    mask_k = offs_k < K

    top = tl.zeros([BLOCK_K], tl.float32)
    for m in range(start, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M).to(tl.int64)
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        x = tl.load(x_ptrs, mask=(offs_m < end)[:, None] & mask_k[None, :], other=0.0)
        top = tl.maximum(top, tl.max(tl.abs(x.to(tl.float32)), 0))
    tl.store(out_ptr + pid_m.to(tl.int64) * K + offs_k, top, mask=mask_k)


def round_rows(
    x: torch.Tensor, dtype: torch.dtype, factor: torch.Tensor | None, *, config: Config
) -> Rounded:
    """Round `x ⊙ factor` [M, K], M > 0, to int8 (columns apart) or e4m3."""
    (M, K), apart, columns = x.shape, None, None
    if dtype == torch.int8 and K > 1:
        factor, columns, stands_out = _set_apart(x, factor, config)
        apart = torch.where(stands_out, x[:, columns], 0)
    q = x.new_empty(M, K, dtype=dtype)
    scale = x.new_empty(M, dtype=torch.float32)
    _round_rows[(triton.cdiv(M, config.block_m),)](
        x_ptr=x, factor_ptr=None if factor is None else factor.contiguous(), q_ptr=q,
        scale_ptr=scale, M=M, K=K, stride_xm=x.stride(0), stride_xk=x.stride(1),
        largest=LARGEST[dtype], smallest=SMALLEST[dtype], INTEGER=dtype == torch.int8,
        BLOCK_M=config.block_m, BLOCK_K=config.block_k, num_warps=config.warps, num_stages=1,
        enable_fp_fusion=True,
    )  # fmt: skip
    return Rounded(q, scale, apart, columns)


def _set_apart(x: torch.Tensor, factor: torch.Tensor | None, config: Config):
    """The factor with zeros at the columns apart, those columns, and which of them count."""
    largest = column_max(x, config=config)
    most = min(MOST_APART, max(1, x.shape[1] // FEWEST_PER_COLUMN_APART))
    felt = largest if factor is None else largest * factor.abs()
    columns = felt.topk(most).indices
    stands_out = felt[columns] > APART * felt.nanmedian()
    factor = torch.ones_like(largest) if factor is None else factor
    kept = torch.where(stands_out, 0.0, factor[columns])
    return factor.index_copy(0, columns, kept), columns, stands_out


def column_max(x: torch.Tensor, *, config: Config) -> torch.Tensor:
    """The largest magnitude in each column of x [M, K], fp32 [K]; nan does not count."""
    M, K = x.shape
    parts = x.new_empty(config.split, K, dtype=torch.float32)
    _column_max[(triton.cdiv(K, config.block_n), config.split)](
        x_ptr=x, out_ptr=parts, M=M, K=K, stride_xm=x.stride(0), stride_xk=x.stride(1),
        SPLIT_M=config.split, BLOCK_M=32, BLOCK_K=config.block_n, num_warps=config.warps,
        num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return parts.amax(0)
