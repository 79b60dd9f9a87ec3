"""The loop of every sum over rows: a tile of `x̃ᵀ S`, and column sums of either operand.

| name | shape  | dtype                  | strides                |
| x    | [M, K] | fp16, bf16, fp32       | any                    |
| s    | [M, R] | any float, cast to x's | rows in a wider matrix |

Blocks of rows are dealt to the PARTS in turn, the last rows first: what wrote or read this matrix
just before left those in the cache.
"""

import triton
import triton.language as tl

from ...core.tiles import keep_mask


@triton.jit
def over_rows(
    x_ptr, s_ptr, seed_ptr, start_k, offs_r, part, M, K, R, stride_xm, stride_xk, stride_sm,
    threshold,
    SUMS: tl.constexpr, PARTS: tl.constexpr, PAIRED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`Σ_m x̃[m, k]·s[m, r]` over a part's rows, and Σ_m of what SUMS names: `x`, `s` or nothing.

    Columns of x are `start_k + [0, BLOCK_K)` with start_k even. With a seed x̃ is x where the mask
    keeps it, not rescaled; sums of `x` do not see the mask.
    """
    offs_k = start_k + tl.arange(0, BLOCK_K).to(tl.int64)
    mask_k, mask_r = offs_k < K, offs_r < R
    blocks = tl.cdiv(M, BLOCK_M)
    acc = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
    sums = tl.zeros([BLOCK_R if SUMS == "s" else BLOCK_K], tl.float32)
    for block in range(part, blocks, PARTS):
        offs_m = (blocks - 1 - block).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        s_ptrs = s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :]
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        s = tl.load(s_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        if SUMS == "x":
            sums += tl.sum(x.to(tl.float32), 0)
        elif SUMS == "s":
            sums += tl.sum(s.to(tl.float32), 0)
        if seed_ptr is not None:
            keep = keep_mask(seed_ptr, offs_m, start_k, K, threshold, PAIRED, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        acc = tl.dot(tl.trans(x), s.to(x.dtype), acc, input_precision="ieee")
    return acc, sums
