"""A bottleneck on a block of rows: down, activation, dropout, up and residual in one launch.

    forward   z  = x Dᵀ + b_d,  h = dropout(act(z))     y  = residual + s·(h Uᵀ + b_u)
    backward  dz = (dY U)·mask·act'(z)                  dX = dY (if x is the residual) + s·dz D

Both are the same two products with a hidden stage between them: `out = residual + s·(hidden(x Fᵀ)
Eᵀ + bias_out)`, forward with F = D, E = U, backward with x = dY, F = Uᵀ, E = Dᵀ.

| name     | shape  | dtype                  | strides    |
| x        | [M, K] | fp16, bf16, fp32       | any        |
| f, e     | [R, K], [K, R] | any float, cast to x's | any |
| residual | [M, K] | x's                    | any        |
| z        | [M, R] | fp32 (written forward, read backward) | contiguous |
| dz, h    | [M, R] | fp32 or x's, x's       | contiguous |
| out      | [M, K] | x's                    | contiguous |

Accumulates in fp32; rounded to x's dtype: D, U, the hidden tile before the second product, and
out. 4·M·K·R FLOPs; bytes: x and out once, x again where the block has left the cache, D and U
once a block of rows. Against separate products it saves the passes over h's pre-images and over y
(plain torch moves 10·M·K bytes in 16 bits, this 4 to 6). Width at most 256: the hidden tile stays
in registers.
"""

import torch
import triton
import triton.language as tl

from ...core.tiles import effective_scale
from ...core.tiling import Config, cdiv, whole_rank
from ..low_rank.arguments import NO_DROPOUT, UNSCALED, Dropout, Scale, contiguous, strides
from ..low_rank.hidden import finish_hidden


@triton.jit(do_not_specialize=["M", "threshold"])
def _row_block(
    x_ptr, f_ptr, e_ptr, residual_ptr, bias_ptr, bias_out_ptr, z_ptr, hidden_ptr, h_ptr, out_ptr,
    seed_ptr, scale_ptr,
    M, K, R,
    stride_xm, stride_xk, stride_fr, stride_fk, stride_ek, stride_er,
    stride_residual_m, stride_residual_k,
    scale, threshold, rescale,
    STAGE: tl.constexpr, ACTIVATION: tl.constexpr, PAIRED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m = tl.program_id(0).to(tl.int64)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m, mask_r = offs_m < M, offs_r < R

    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_k = offs_k < K
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        f_ptrs = f_ptr + offs_k[:, None] * stride_fk + offs_r[None, :] * stride_fr
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        f = tl.load(f_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0).to(x.dtype)
        acc = tl.dot(x, f, acc, input_precision="ieee")

    dtype = x_ptr.dtype.element_ty
    out, h = finish_hidden(
        acc, bias_ptr, z_ptr, hidden_ptr, h_ptr, seed_ptr, offs_m, 0, M, R, R, R,
        threshold, rescale, STAGE, ACTIVATION, PAIRED, BLOCK_R,
    )  # fmt: skip
    hidden = (h if STAGE == "forward" else out).to(dtype)
    alpha = effective_scale(scale, scale_ptr)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_k = offs_k < K
        mask = mask_m[:, None] & mask_k[None, :]
        e_ptrs = e_ptr + offs_r[:, None] * stride_er + offs_k[None, :] * stride_ek
        e = tl.load(e_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0).to(dtype)
        low = tl.dot(hidden, e, input_precision="ieee")
        if bias_out_ptr is not None:
            low += tl.load(bias_out_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
        low *= alpha
        if residual_ptr is not None:
            offs = offs_m[:, None] * stride_residual_m + offs_k[None, :] * stride_residual_k
            low += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offs_m[:, None] * K + offs_k[None, :], low.to(dtype), mask=mask)


def row_block(
    x: torch.Tensor,
    f: torch.Tensor,
    e: torch.Tensor,
    residual: torch.Tensor | None,
    *,
    config: Config,
    stage: str,
    activation: str,
    z: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    bias_out: torch.Tensor | None = None,
    scale: Scale = UNSCALED,
    dropout: Dropout = NO_DROPOUT,
    with_h: bool = False,
    hidden_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return out [M, K], z (forward) or dz (backward) [M, R] and, if asked for, h [M, R].

    `hidden_dtype` is that of z or dz: fp32 to be kept or summed, x's to be multiplied only.
    """
    (M, K), R = x.shape, f.shape[0]
    out = x.new_empty(M, K)
    hidden = x.new_empty(M, R, dtype=hidden_dtype)
    h = x.new_empty(M, R) if with_h else None
    if M == 0:
        return out, hidden, h
    seed, threshold, rescale, paired = dropout.arguments(M, R)
    _row_block[(cdiv(M, config.block_m),)](
        x, f, e, residual, contiguous(bias), contiguous(bias_out), z, hidden, h, out,
        seed, scale.tensor,
        M, K, R,
        *x.stride(), *f.stride(), *e.stride(),
        *strides(residual),
        scale.number, threshold, rescale,
        stage, activation, paired, config.block_m, config.block_k, whole_rank(R),
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out, hidden, h
