"""What products with a low-rank term share: the term's tile and its biases.

The accumulator of a tile of y starts from `s·mask·(S Bᵀ)`; the biases join it before the store.

| name     | shape  | dtype                        | strides    |
| s        | [M, R] | any float, cast to `dtype`   | rows in a wider matrix |
| b        | [N, R] | any float, cast to `dtype`   | any        |
| bias_low | [N]    | any float                    | contiguous |
"""

import triton
import triton.language as tl

from ...core.tiles import effective_scale, keep_mask


@triton.jit
def low_rank_tile(
    s_ptr, b_ptr, seed_ptr, scale_ptr, offs_m, start_n, M, N, R, stride_sm, stride_bn, stride_br,
    scale, threshold, rescale, dtype: tl.constexpr,
    PAIRED: tl.constexpr, RANK_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`s·mask·(S Bᵀ)`, float32 [BLOCK_M, BLOCK_N]."""
    offs_n = start_n + tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m, mask_n = offs_m < M, offs_n < N

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # Not unrolled: loads of all blocks at once would spill.
    for block in tl.range(0, RANK_BLOCKS, num_stages=1):
        offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = offs_r < R
        s_ptrs = s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :]
        b_ptrs = b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
        s = tl.load(s_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0).to(dtype)
        b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0).to(dtype)
        acc = tl.dot(s, b, acc, input_precision="ieee")

    if seed_ptr is not None:
        keep = keep_mask(seed_ptr, offs_m, start_n, N, threshold, PAIRED, BLOCK_N)
        acc = tl.where(keep, acc * tl.cast(rescale, tl.float32), 0.0)
    return acc * effective_scale(scale, scale_ptr)


@triton.jit
def add_biases(acc, bias_ptr, bias_low_ptr, scale_ptr, scale, offs_n, mask_n):
    """`acc + bias + s·bias_low`, each where it exists."""
    if bias_low_ptr is not None:
        bias_low = tl.load(bias_low_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        acc += (bias_low * effective_scale(scale, scale_ptr))[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    return acc
