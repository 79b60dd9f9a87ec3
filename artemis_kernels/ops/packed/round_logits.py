"""Rows of the gradient of logits rounded to int8: p − 1 at a row's target and p elsewhere.

    v = x ⊙ factor      peak = v[at], the largest of a row; from here on v is 0 there
    scale = max|v| / 126      C_k = Σ_{j ≤ k} v_j / scale      q_k = ⌊C_k + ½⌋ − ⌊C_{k−1} + ½⌋

| name   | shape  | dtype            | strides    |
| x      | [M, K] | fp16, bf16, fp32 | any        |
| factor | [K]    | fp32             | contiguous |
| q      | [M, K] | int8             | contiguous |
| scale  | [M]    | fp32             | contiguous |
| peak   | [M]    | fp32             | contiguous |
| at     | [M]    | int64            | contiguous |

What rounding leaves of a number goes to the next: any sum of neighbours is kept to within a step,
so thousands of small numbers keep theirs. This is `core.eight_bit_rows.round_logits` with one chain
a row in place of 64. Numbers rounded one after the other would take as long as the row; differences
of rounded sums take a scan of many columns at a time.

C is a fixed-point number with 24 bits behind the point. Its sums are exact in any order, so that
tiles change no bit; they may wrap round, which a difference of 8 bits does not see.

One program a row. Bytes: x twice (the second time from the cache, if rows are short), q once.
A row that holds inf or nan gets q = 0, scale nan and peak 0; one whose rest is too small q = 0,
scale 0 and its peak.
"""

import torch
import triton
import triton.language as tl

from ...core.eight_bit_rows import Peaks
from ...core.tiling import Config
from .round_rows import Rounded

_FP32_MAX = tl.constexpr(3.4028234663852886e38)
_SMALLEST = tl.constexpr(1e-36)  # 126 / smallest must be finite
_BITS = tl.constexpr(24)  # behind the point
_ONE = tl.constexpr(float(1 << 24))
_HALF = tl.constexpr(1 << 23)


@triton.jit
def _scaled(x_ptr, factor_ptr, offs_k, stride_xk, K):
    """v at some columns of a row, fp32; 0 past the end."""
    mask = offs_k < K
    x = tl.load(x_ptr + offs_k * stride_xk, mask=mask, other=0.0).to(tl.float32)
    return x * tl.load(factor_ptr + offs_k, mask=mask, other=0.0)


@triton.jit
def _two_largest(x_ptr, factor_ptr, stride_xk, K, BLOCK_K: tl.constexpr):
    """The largest |v| of a row, its column, and the next; inf where something is not finite."""
    lanes = tl.arange(0, BLOCK_K)
    first, second = tl.zeros([BLOCK_K], tl.float32), tl.zeros([BLOCK_K], tl.float32)
    column = tl.zeros([BLOCK_K], tl.int32)  # of each lane's first
    for k in range(0, K, BLOCK_K):
        size = tl.abs(_scaled(x_ptr, factor_ptr, k + lanes.to(tl.int64), stride_xk, K))
        size = tl.where(size <= _FP32_MAX, size, float("inf"))  # false for nan
        second = tl.maximum(second, tl.minimum(first, size))
        column = tl.where(size > first, k + lanes, column)
        first = tl.maximum(first, size)

    top = tl.argmax(first, 0)
    at = tl.sum(tl.where(lanes == top, column, 0), 0)
    return tl.max(first, 0), at, tl.max(tl.where(lanes == top, second, first), 0)


@triton.jit
def _round_logits(
    x_ptr, factor_ptr, q_ptr, scale_ptr, peak_ptr, at_ptr,
    K,
    stride_xm, stride_xk,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    q_ptr += row * K

    largest, at, rest = _two_largest(x_ptr, factor_ptr, stride_xk, K, BLOCK_K)
    finite = largest <= _FP32_MAX
    usable = finite & (rest > _SMALLEST)
    inverse = tl.where(usable, 126.0 / tl.where(usable, rest, 1.0), 0.0)
    scale = tl.where(usable, rest / 126.0, tl.where(finite, 0.0, float("nan")))
    peak = _scaled(x_ptr, factor_ptr, at.to(tl.int64), stride_xk, K)
    tl.store(scale_ptr + row, scale)
    tl.store(peak_ptr + row, tl.where(finite, peak, 0.0))
    tl.store(at_ptr + row, at.to(tl.int64))

    left = tl.zeros([], tl.int32)  # by the columns before: C minus what they were rounded to
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        v = _scaled(x_ptr, factor_ptr, offs_k, stride_xk, K)
        v = tl.where(offs_k == at, 0.0, tl.where(usable, v * inverse, 0.0))
        steps = (v * _ONE).to(tl.int32)
        sums = left + tl.cumsum(steps, 0)
        q = ((sums + _HALF) >> _BITS) - ((sums - steps + _HALF) >> _BITS)
        tl.store(q_ptr + offs_k, q.to(tl.int8), mask=offs_k < K)
        left += tl.sum(steps - (q << _BITS), 0)


def round_logits(x: torch.Tensor, factor: torch.Tensor, *, config: Config) -> Rounded:
    """Round `x ⊙ factor` [M, K], M and K > 0, to int8, but for the largest number of each row."""
    M, K = x.shape
    q = x.new_empty(M, K, dtype=torch.int8)
    scale, peak = x.new_empty(M, dtype=torch.float32), x.new_empty(M, dtype=torch.float32)
    at = x.new_empty(M, dtype=torch.int64)
    _round_logits[(M,)](
        x, factor.contiguous(), q, scale, peak, at,
        K,
        *x.stride(),
        config.block_k,
        num_warps=config.warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return Rounded(q, scale, peaks=Peaks(peak, at))
