"""`x Wᵀ` and its epilogue for a packed W: the weight is dequantized tile by tile, on the left.

| name   | shape            | dtype                                   | strides    |
| x      | [M, K]           | fp16, bf16, fp32                        | any        |
| w      | [N, K or K/2]    | bytes of the format (codes.py)          | contiguous |
| scales | [N] or [N, K/g]  | fp32; or bf16, of groups, and offsets   | contiguous |
| parts  | [P, M, N]        | fp32, where K is cut                    | contiguous |
| y      | [M, N]           | x's                                     | contiguous |

2·M·N·(K + R) FLOPs; bytes W once for each BLOCK_M rows, x from the cache, y once. For few rows the
weight's bytes are all there is: its tile is the left operand of the dot, since a tensor core of
Hopper takes only that one from registers, and a dequantized right one would go through shared
memory; K is cut into `split` parts to keep every processor reading, whose fp32 sums are added in a
fixed order. int8 and fp8 are exact in 16 bits, so their products round nothing; int4 is rounded
once, to x's dtype.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ...core.quantized import QuantizedWeight
from ...core.tiling import Config, cdiv
from .codes import group_values, low_columns, numbers, pair_of_weights
from .epilogue import Epilogue, finish, finish_tile


@triton.jit
def _columns_of_x(x_ptr, offs_m, offs_k, M, K, stride_xm, stride_xk):
    """Columns of x as a right operand [columns, BLOCK_M]; zero past the end."""
    ptrs = x_ptr + offs_k[:, None] * stride_xk + offs_m[None, :] * stride_xm
    return tl.load(ptrs, mask=(offs_k < K)[:, None] & (offs_m < M)[None, :], other=0.0)


@triton.jit(do_not_specialize=["M", "threshold"])
def _weight_only(
    x_ptr, w_ptr, group_scale_ptr, group_offset_ptr, part_ptr,
    row_ptr, column_ptr, xa_ptr, wa_ptr, peak_ptr, at_ptr, lines_ptr, s_ptr, b_ptr, bias_ptr,
    bias_low_ptr, residual_ptr, y_ptr, seed_ptr, scale_ptr,
    M, N, R, A, K, columns,
    stride_xm, stride_xk, stride_wan, stride_waa, stride_lk, stride_ln, stride_sm, stride_bn,
    stride_br,
    scale, threshold, rescale,
    FORMAT: tl.constexpr, HALF: tl.constexpr, SPLIT_K: tl.constexpr, PAIRED: tl.constexpr,
    RANK_BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid, pid_k = tl.program_id(0), tl.program_id(1)
    tiles_m = tl.cdiv(M, BLOCK_M)
    start_n = pid // tiles_m * BLOCK_N
    chunk = tl.cdiv(tl.cdiv(columns, BLOCK_B), SPLIT_K) * BLOCK_B
    start, end = pid_k * chunk, min(columns, (pid_k + 1) * chunk)
    dtype: tl.constexpr = x_ptr.dtype.element_ty

    offs_m = (pid % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N).to(tl.int64)
    mask_n = offs_n < N

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for byte in range(start, end, BLOCK_B):
        offs_b = byte + tl.arange(0, BLOCK_B)
        w_ptrs = w_ptr + offs_n[:, None] * columns + offs_b[None, :]
        # Each byte is read once by one program: it need not stay in the cache.
        codes = tl.load(
            w_ptrs, mask=mask_n[:, None] & (offs_b < end)[None, :], other=0,
            eviction_policy="evict_first",
        )  # fmt: skip
        if FORMAT == "int4":
            offs_k = low_columns(offs_b, HALF)
            group_scale = group_values(
                group_scale_ptr, offs_n, byte, mask_n, columns, HALF, BLOCK_B
            )
            offset = group_values(group_offset_ptr, offs_n, byte, mask_n, columns, HALF, BLOCK_B)
            low, high = pair_of_weights(codes, group_scale, offset, dtype)
            # A byte past the row's end stands for the offset, not for zero; there x is zero.
            x_low = _columns_of_x(x_ptr, offs_m, offs_k, M, K, stride_xm, stride_xk)
            x_high = _columns_of_x(x_ptr, offs_m, offs_k + HALF, M, K, stride_xm, stride_xk)
            acc = tl.dot(low, x_low, acc, input_precision="ieee")
            acc = tl.dot(high, x_high, acc, input_precision="ieee")
        else:
            x = _columns_of_x(x_ptr, offs_m, offs_b, M, K, stride_xm, stride_xk)
            acc = tl.dot(numbers(codes, FORMAT, dtype), x, acc, input_precision="ieee")

    tile = tl.trans(acc)
    if SPLIT_K == 1:
        finish_tile(
            tile, row_ptr, column_ptr, xa_ptr, wa_ptr, peak_ptr, at_ptr, lines_ptr, s_ptr, b_ptr,
            bias_ptr, bias_low_ptr, residual_ptr, y_ptr, seed_ptr, scale_ptr, offs_m, start_n, M, N,
            R, A, stride_wan, stride_waa, stride_lk, stride_ln, stride_sm, stride_bn, stride_br,
            scale, threshold, rescale, PAIRED, RANK_BLOCKS, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    else:
        parts = part_ptr + pid_k.to(tl.int64) * M * N
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        tl.store(parts + offs_m[:, None] * N + offs_n[None, :], tile, mask=mask)


def weight_only(
    x: torch.Tensor, weight: QuantizedWeight, epilogue: Epilogue, *, config: Config
) -> torch.Tensor:
    """Return y [M, N] in x's dtype; a row scale joins the epilogue."""
    (M, K), N = x.shape, weight.shape[0]
    y = x.new_empty(M, N)
    if M == 0:
        return y
    data, scale = weight.data.contiguous(), weight.scale.contiguous()
    in_groups = weight.format == "int4"
    if not in_groups:
        epilogue = epilogue._replace(column=scale)
    half = weight.group_size // 2 if in_groups else 1
    split = config.split
    parts = None if split == 1 else x.new_empty(split, M, N, dtype=torch.float32)
    pointers, sizes, steps, numbers, paired = epilogue.arguments(y)
    _weight_only[(cdiv(M, config.block_m) * cdiv(N, config.block_n), split)](
        x, data.view(torch.int8 if weight.format == "int8" else torch.uint8),
        scale if in_groups else None, weight.offset.contiguous() if in_groups else None, parts,
        *pointers,
        *sizes, K, data.shape[1],
        *x.stride(), *steps,
        *numbers,
        weight.format, half, split, paired,
        epilogue.rank_blocks(config.block_r), config.block_m, config.block_n,
        bytes_a_step(config.block_k, half), config.block_r,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if parts is not None:  # in narrower tiles: there is no loop to feed, only programs to find
        finish(parts, y, epilogue, config=replace(config, block_n=32, stages=1))
    return y


def bytes_a_step(block_k: int, half: int) -> int:
    """Bytes a step of the loop reads of each row: of int4 at most those of one group, if it has 16.

    `half` is 1 for a byte a number; a dot needs 16 numbers.
    """
    if half == 1:
        return block_k
    return min(block_k // 2, half) if half >= 16 else block_k // 2
