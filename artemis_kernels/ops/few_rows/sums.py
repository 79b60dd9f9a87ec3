"""`x Wᵀ` of a few rows in fp32, over a weight in any format: each number of W is read once.

| name          | shape         | dtype                                  | strides                 |
| x             | [M, K]        | fp16, bf16, fp32                       | any                     |
| w             | [N, K or K/2] | any float, or a format's bytes (codes) | contiguous along a row  |
| scale, offset | [N, K/g]      | bf16, of int4                          | contiguous              |

A program takes a few rows of W and walks along all of K, each thread by loads of 16 bytes, a
`VECTOR`, into fp32 sums of its own; threads are added after the loop. Nothing is rounded on the
way: x, int8, e4m3 and the codes of int4 become fp32 exactly.
"""

import triton
import triton.language as tl

from ..packed.codes import numbers_in_fp32


@triton.jit
def row_sums(
    x_ptr, w_ptr, group_scale_ptr, group_offset_ptr, offs_n, M, columns,
    stride_xm, stride_xk, stride_wn,
    FORMAT: tl.constexpr, HALF: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Sums [BLOCK_M, BLOCK_N] of x's first rows with rows `offs_n` of w, which all exist.

    `columns`: numbers, or bytes, that a row of w stores; `EVEN`: BLOCK_B divides them. Row scales
    are left to the caller.
    """
    IN_GROUPS: tl.constexpr = FORMAT == "int4"
    RUN: tl.constexpr = min(BLOCK_B, HALF) if IN_GROUPS else BLOCK_B
    VECTOR: tl.constexpr = min(RUN, 128 // w_ptr.dtype.element_ty.primitive_bitwidth)
    OTHER: tl.constexpr = None if EVEN else 0
    offs_v = tl.arange(0, BLOCK_B // VECTOR) * VECTOR
    w_rows = w_ptr + offs_n[:, None, None] * stride_wn

    sums = (tl.zeros([BLOCK_N, BLOCK_B // VECTOR, VECTOR], tl.float32),) * BLOCK_M
    for start in tl.range(0, columns, BLOCK_B, num_stages=STAGES):
        offs_b = (start + offs_v)[:, None] + tl.arange(0, VECTOR)[None, :]
        offs_k = offs_b
        mask = None if EVEN else offs_b < columns
        # Each byte is read once by one program: it need not stay in the cache.
        codes = tl.load(
            w_rows + offs_b[None], mask=None if EVEN else mask[None], other=OTHER,
            eviction_policy="evict_first",
        )  # fmt: skip
        if IN_GROUPS:
            group = (start + offs_v) // HALF
            offs_g = offs_n[:, None] * (columns // HALF) + group[None, :]
            mask_g = None if EVEN else (start + offs_v < columns)[None, :]
            scale = tl.load(group_scale_ptr + offs_g, mask=mask_g, other=OTHER).to(tl.float32)
            offset = tl.load(group_offset_ptr + offs_g, mask=mask_g, other=OTHER).to(tl.float32)
            # A byte past the row's end stands for the offset, not for zero; there x is zero.
            w = (codes & 15).to(tl.float32) * scale[:, :, None] + offset[:, :, None]
            w_high = (codes >> 4).to(tl.float32) * scale[:, :, None] + offset[:, :, None]
            offs_k += group[:, None] * HALF
        else:
            w = numbers_in_fp32(codes, FORMAT)
        further = ()
        for m in tl.static_range(BLOCK_M):
            # Rows past the last one repeat it.
            x_ptrs = x_ptr + min(m, M - 1) * stride_xm + offs_k * stride_xk
            x = tl.load(x_ptrs, mask=mask, other=OTHER).to(tl.float32)
            acc = sums[m] + x[None] * w
            if IN_GROUPS:
                x_ptrs += HALF * stride_xk
                acc += tl.load(x_ptrs, mask=mask, other=OTHER).to(tl.float32)[None] * w_high
            further += (acc,)
        sums = further

    rows = tl.arange(0, BLOCK_M)[:, None]
    out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for m in tl.static_range(BLOCK_M):
        out = tl.where(rows == m, tl.sum(tl.sum(sums[m], 2), 1)[None, :], out)
    return out
