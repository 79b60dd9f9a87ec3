"""`y = x Wᵀ + bias + s·(S Bᵀ + bias_low)`: the accumulator starts from the low-rank term.

The same body gives dX (`x = dY`, `W = Wᵀ`, `S = dS`, `B = Aᵀ`), where LoRA's dropout masks the
low-rank term: `dX = dY W + s·mask/keep·(dS A)`. `update` adds the term to a matrix that exists
already.

| name           | shape  | dtype                   | strides    |
| x              | [M, K] | fp16, bf16, fp32        | any        |
| weight         | [N, K] | x's                     | any        |
| s              | [M, R] | any float, cast to x's  | rows in a wider matrix |
| b              | [N, R] | any float, cast to x's  | any        |
| bias, bias_low | [N]    | any float               | contiguous |
| y              | [M, N] | x's                     | contiguous |

Everything accumulates in fp32 and is rounded once, at the store; S and B are rounded to x's dtype
for the product, the scale multiplies in fp32. 2·M·N·(K + R) FLOPs; bytes x, W, S, B, y once.
Against `addmm_` into a finished y this saves reading and writing y again (4·M·N bytes in 16
bits).
"""

import torch
import triton
import triton.language as tl

from ...core.tiles import grouped_tile
from ...core.tiling import Config, cdiv
from .arguments import NO_DROPOUT, UNSCALED, Dropout, Scale, contiguous, strides
from .low_rank_tile import add_biases, low_rank_tile


@triton.jit(do_not_specialize=["M", "threshold"])
def _expand(
    x_ptr, w_ptr, s_ptr, b_ptr, bias_ptr, bias_low_ptr, y_ptr, seed_ptr, scale_ptr,
    M, N, K, R,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_sm, stride_bn, stride_br,
    scale, threshold, rescale,
    PAIRED: tl.constexpr, EVEN_K: tl.constexpr, RANK_BLOCKS: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = grouped_tile(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    start_n = pid_n * BLOCK_N

    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m, mask_n = offs_m < M, offs_n < N
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = w_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn

    acc = low_rank_tile(
        s_ptr, b_ptr, seed_ptr, scale_ptr, offs_m, start_n, M, N, R, stride_sm, stride_bn,
        stride_br, scale, threshold, rescale, x_ptr.dtype.element_ty,
        PAIRED, RANK_BLOCKS, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    for k in range(0, K, BLOCK_K):
        mask_x, mask_w = mask_m[:, None], mask_n[None, :]
        if not EVEN_K:
            mask_k = k + tl.arange(0, BLOCK_K) < K
            mask_x, mask_w = mask_x & mask_k[None, :], mask_w & mask_k[:, None]
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        w = tl.load(w_ptrs, mask=mask_w, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk

    acc = add_biases(acc, bias_ptr, bias_low_ptr, scale_ptr, scale, offs_n, mask_n)
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["M", "threshold"])
def _update(
    residual_ptr, s_ptr, b_ptr, bias_low_ptr, y_ptr, seed_ptr, scale_ptr,
    M, N, R,
    stride_residual_m, stride_residual_n, stride_sm, stride_bn, stride_br,
    scale, threshold, rescale,
    PAIRED: tl.constexpr, RANK_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    start_n = tl.program_id(0) % tiles_n * BLOCK_N

    offs_m = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N).to(tl.int64)
    mask_n = offs_n < N
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    if residual_ptr is not None:  # on its way while the term is formed
        offs = offs_m[:, None] * stride_residual_m + offs_n[None, :] * stride_residual_n
        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0)

    acc = low_rank_tile(
        s_ptr, b_ptr, seed_ptr, scale_ptr, offs_m, start_n, M, N, R, stride_sm, stride_bn,
        stride_br, scale, threshold, rescale, y_ptr.dtype.element_ty,
        PAIRED, RANK_BLOCKS, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip

    acc = add_biases(acc, None, bias_low_ptr, scale_ptr, scale, offs_n, mask_n)
    if residual_ptr is not None:
        acc += residual.to(tl.float32)
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def expand(
    x: torch.Tensor,
    weight: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    *,
    config: Config,
    bias: torch.Tensor | None = None,
    bias_low: torch.Tensor | None = None,
    scale: Scale = UNSCALED,
    dropout: Dropout = NO_DROPOUT,
) -> torch.Tensor:
    """Return y [M, N] in x's dtype; dropout masks the low-rank term."""
    (M, K), (N, R) = x.shape, b.shape
    y = x.new_empty(M, N)
    if M == 0:
        return y
    seed, threshold, rescale, paired = dropout.arguments(M, N)
    _expand[(cdiv(M, config.block_m) * cdiv(N, config.block_n),)](
        x, weight, s, b, contiguous(bias), contiguous(bias_low), y, seed, scale.tensor,
        M, N, K, R,
        *x.stride(), *weight.stride(), s.stride(0), *b.stride(),
        scale.number, threshold, rescale,
        paired, K % config.block_k == 0, cdiv(R, config.block_r), 8,
        config.block_m, config.block_n, config.block_k, config.block_r,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def update(
    residual: torch.Tensor | None,
    s: torch.Tensor,
    b: torch.Tensor,
    *,
    config: Config,
    dtype: torch.dtype,
    bias_low: torch.Tensor | None = None,
    scale: Scale = UNSCALED,
    dropout: Dropout = NO_DROPOUT,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `residual + s·(mask·(S Bᵀ) + bias_low)` [M, N] of `dtype`.

    Written to `out` if given, which may be the residual: a tile is read before it is stored.
    """
    M, (N, R) = s.shape[0], b.shape
    y = s.new_empty(M, N, dtype=dtype) if out is None else out
    if M == 0:
        return y
    seed, threshold, rescale, paired = dropout.arguments(M, N)
    _update[(cdiv(M, config.block_m) * cdiv(N, config.block_n),)](
        residual, s, b, contiguous(bias_low), y, seed, scale.tensor,
        M, N, R,
        *strides(residual), s.stride(0), *b.stride(),
        scale.number, threshold, rescale,
        paired, cdiv(R, config.block_r), config.block_m, config.block_n, config.block_r,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return y
