"""Columns that are kept apart where x is rounded to int8, and the weights they are multiplied by.

    felt = max|x| · |factor|     columns = the A largest of felt     counts = felt > 4 · median
    kept = factor, 0 at the columns that count     wa = data[:, columns] · scale

| name    | shape  | dtype                                         | strides    |
| x       | [M, K] | fp16, bf16, fp32                              | any        |
| factor  | [K]    | fp32                                          | contiguous |
| parts   | [P, K] | fp32, max \\|x\\| over P ranges of rows         | contiguous |
| columns | [A]    | int64                                         | contiguous |
| counts  | [A]    | int8, 0 or 1                                  | contiguous |
| kept    | [K]    | fp32                                          | contiguous |
| data    | [N, K] | int8, a weight or its transpose               | any        |
| scale   | [N]    | fp32; [K] of a transpose                      | contiguous |
| wa      | [N, A] | x's                                           | any        |

int8's even steps lose small features beside a few huge ones (Dettmers et al., arXiv 2208.07339), so
columns above four medians are kept apart. Here their number is fixed by the shape (K/64, at most
16: one step of a dot in the epilogue), and what does not stand out is taken back by a zero: nothing
is read back from the device. A nan is no number: it is among the largest, never above the median,
which is that of the others.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...core.eight_bit_rows import APART, FEWEST_PER_COLUMN_APART
from ...core.tiling import Config, cdiv
from ..low_rank.arguments import contiguous
from .epilogue import MOST_APART

_BLOCK_K = 4096  # columns that one program looks at together: 16 a thread
_BLOCK_N = 1024  # rows of the weight a warp gathers


class Apart(NamedTuple):
    """The columns apart, and what is left of the factor."""

    kept: torch.Tensor  # fp32 [K]
    columns: torch.Tensor  # int64 [A]
    counts: torch.Tensor  # int8 [A], 0 where a column does not stand out


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

    top = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)  # one reduction, behind the loop
    for m in range(start, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M).to(tl.int64)
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        x = tl.load(x_ptrs, mask=(offs_m < end)[:, None] & mask_k[None, :], other=0.0)
        top = tl.maximum(top, tl.abs(x.to(tl.float32)))
    tl.store(out_ptr + pid_m.to(tl.int64) * K + offs_k, tl.max(top, 0), mask=mask_k)


@triton.jit
def _walk(felt_ptr, last, K, apart, BLOCK_K: tl.constexpr):
    """The largest key below `last`, and how many columns `last` exceeds more than `apart` times.

    A key holds the bits of felt (a nan's above all others), then what is less for a later column.
    """
    bound = (last >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    best = tl.full([BLOCK_K], -1, tl.int64)
    below = tl.zeros([BLOCK_K], tl.int32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_k = offs_k < K
        felt = tl.load(felt_ptr + offs_k, mask=mask_k, other=0.0)
        bits = tl.where(felt == felt, felt.to(tl.int32, bitcast=True), 0x7FFFFFFF)
        key = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - offs_k)
        best = tl.maximum(best, tl.where(mask_k & (key < last), key, -1))
        below += (mask_k & (felt * apart < bound)).to(tl.int32)  # no nan is
    return tl.max(best, 0), tl.sum(below, 0)


@triton.jit(do_not_specialize=["P", "A"])
def _set_apart(
    part_ptr, factor_ptr, kept_ptr, columns_ptr, counts_ptr,
    P, K, A,
    apart,
    MOST: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    apart = tl.cast(apart, tl.float32)
    numbers = tl.zeros([BLOCK_K], tl.int32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_k = offs_k < K
        felt = tl.zeros([BLOCK_K], tl.float32)
        for part in tl.range(0, P, loop_unroll_factor=4):  # one program: it waits for many at once
            part_ptrs = part_ptr + tl.cast(part, tl.int64) * K + offs_k
            felt = tl.maximum(felt, tl.load(part_ptrs, mask=mask_k, other=0.0))
        factor = tl.full([BLOCK_K], 1.0, tl.float32)
        if factor_ptr is not None:
            factor = tl.load(factor_ptr + offs_k, mask=mask_k, other=0.0)
            felt *= tl.abs(factor)
        tl.store(part_ptr + offs_k, felt, mask=mask_k)
        tl.store(kept_ptr + offs_k, factor, mask=mask_k)
        numbers += (mask_k & (felt == felt)).to(tl.int32)
    tl.debug_barrier()  # from here on threads read what others wrote, and write over it

    offs_a = tl.arange(0, MOST)
    top, lower = tl.zeros([MOST], tl.int64), tl.zeros([MOST], tl.int32)
    last = tl.cast(0x7FFFFFFFFFFFFFFF, tl.int64)  # above every key, and no number
    for a in range(0, A + 1):  # a walk finds a column, and counts for the one found before
        key, below = _walk(part_ptr, last, K, apart, BLOCK_K)
        lower = tl.where(offs_a == a - 1, below, lower)
        top = tl.where(offs_a == a, key, top)
        last = key

    # Above `apart` medians is where half of the numbers are so far below: none need be in order.
    counts = (lower > 0) & (2 * lower >= tl.sum(numbers, 0))
    columns = 0x7FFFFFFF - (top & 0xFFFFFFFF)
    mask_a = offs_a < A
    tl.store(columns_ptr + offs_a, columns, mask=mask_a)
    tl.store(counts_ptr + offs_a, counts.to(tl.int8), mask=mask_a)
    tl.store(kept_ptr + columns, tl.zeros([MOST], tl.float32), mask=mask_a & counts)


@triton.jit
def _weights_apart(
    data_ptr, scale_ptr, columns_ptr, wa_ptr,
    N,
    stride_dn, stride_dk, stride_wn, stride_wa,
    TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    a = tl.program_id(1)
    column = tl.load(columns_ptr + a)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    data_ptrs = data_ptr + column * stride_dk + offs_n * stride_dn
    data = tl.load(data_ptrs, mask=mask_n, other=0).to(tl.float32)
    if TRANSPOSED:
        data *= tl.load(scale_ptr + column)
    else:
        data *= tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)
    wa_ptrs = wa_ptr + offs_n * stride_wn + a * stride_wa
    tl.store(wa_ptrs, data.to(wa_ptr.dtype.element_ty), mask=mask_n)


def column_max(x: torch.Tensor, *, config: Config) -> torch.Tensor:
    """The largest magnitude in each column of a range of rows, fp32 [P, K]; nan does not count."""
    M, K = x.shape
    parts = x.new_empty(config.split, K, dtype=torch.float32)
    _column_max[(cdiv(K, config.block_n), config.split)](
        x, parts,
        M, K,
        *x.stride(),
        config.split, 32, config.block_n,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return parts


def set_apart(parts: torch.Tensor, factor: torch.Tensor | None) -> Apart:
    """Find the columns to be kept apart, K > 1; what is in `parts` is lost."""
    P, K = parts.shape
    A = min(MOST_APART, max(1, K // FEWEST_PER_COLUMN_APART))
    kept = parts.new_empty(K)
    columns = parts.new_empty(A, dtype=torch.int64)
    counts = parts.new_empty(A, dtype=torch.int8)
    _set_apart[(1,)](
        parts, contiguous(factor), kept, columns, counts,
        P, K, A,
        APART,
        MOST_APART, _BLOCK_K,
        num_warps=8, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return Apart(kept, columns, counts)


def weights_apart(
    data: torch.Tensor,
    scale: torch.Tensor,
    columns: torch.Tensor,
    dtype: torch.dtype,
    *,
    transposed: bool,
) -> torch.Tensor:
    """The weights [N, A] of `columns`, dequantized; `transposed`: of data's and scale's rows."""
    N, A = data.shape[1 if transposed else 0], columns.shape[0]
    wa = scale.new_empty((A, N) if transposed else (N, A), dtype=dtype)
    if transposed:
        data, wa = data.t(), wa.t()
    _weights_apart[(cdiv(N, _BLOCK_N), A)](
        data, scale.contiguous(), columns, wa,
        N,
        *data.stride(), *wa.stride(),
        transposed, _BLOCK_N,
        num_warps=1, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return wa
