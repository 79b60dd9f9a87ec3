"""`S = x̃ Fᵀ` and what follows it (bias, activation, dropout) from one read of x.

    linear    S = dropout(x) Fᵀ
    forward   z = x Fᵀ + bias,  h = dropout(act(z))
    backward  dz = (x Fᵀ) · mask · act'(z)         with x = dY and F = Uᵀ

| name | shape  | dtype                 | strides    |
| x    | [M, K] | fp16, bf16, fp32      | any        |
| f    | [R, K] | any float, cast to x's| any        |
| bias | [R]    | any float             | contiguous |
| z    | [M, R] | fp32, saved           | rows in a wider matrix |
| out  | [M, R] | fp32                  | rows in a wider matrix |
| h    | [M, R] | x's                   | contiguous |

F's of several bottlenecks may be stacked: `widths` are their rows, and each draws the mask of its
own [M, width]. `out` is scaled where its next reader adds several of different scales.

Products accumulate in fp32; only F is rounded (to x's dtype), and h on its way out. 2·M·K·R
FLOPs; bytes: x once for each BLOCK_R columns of F (so F's of several layers, stacked, share one
read), F, out. Where rows are few, K is cut into `split` parts whose sums are added in a fixed
order: the result does not depend on scheduling. Drawing the mask inside costs no traffic, where a
stored one costs 1 to 3 bytes an element.
"""

import torch
import triton
import triton.language as tl

from ...core.tiles import keep_mask
from ...core.tiling import Config, cdiv, whole_rank
from .arguments import NO_DROPOUT, Dropout, Scale, contiguous, strides
from .hidden import finish_hidden


@triton.jit(do_not_specialize=["M", "threshold"])
def _shrink(
    x_ptr, f_ptr, bias_ptr, z_ptr, out_ptr, h_ptr, seed_ptr, scale_ptr,
    M, K, R, widths,
    stride_xm, stride_xk, stride_fr, stride_fk, stride_zm, stride_outm,
    scale, threshold, rescale,
    STAGE: tl.constexpr, ACTIVATION: tl.constexpr, PAIRED: tl.constexpr, EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid, pid_k = tl.program_id(0), tl.program_id(1)
    tiles_r = tl.cdiv(R, BLOCK_R)
    start_r = pid % tiles_r * BLOCK_R
    chunk = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    start_k = pid_k * chunk
    end_k = min(K, start_k + chunk)

    offs_m = (pid // tiles_r).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = start_r + tl.arange(0, BLOCK_R).to(tl.int64)
    offs_k = start_k + tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m, mask_r = offs_m < M, offs_r < R
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    f_ptrs = f_ptr + offs_k[:, None] * stride_fk + offs_r[None, :] * stride_fr

    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(start_k, end_k, BLOCK_K):
        mask_x, mask_f = mask_m[:, None], mask_r[None, :]
        if not EVEN_K:
            mask_k = k + tl.arange(0, BLOCK_K) < end_k
            mask_x, mask_f = mask_x & mask_k[None, :], mask_f & mask_k[:, None]
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        f = tl.load(f_ptrs, mask=mask_f, other=0.0).to(x.dtype)
        if STAGE == "linear" and seed_ptr is not None:
            x = tl.where(keep_mask(seed_ptr, offs_m, k, K, threshold, PAIRED, BLOCK_K), x, 0.0)
        acc = tl.dot(x, f, acc, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        f_ptrs += BLOCK_K * stride_fk

    if SPLIT_K == 1:
        finish_hidden(
            acc, bias_ptr, z_ptr, out_ptr, h_ptr, seed_ptr, offs_m, start_r, M, R, stride_zm,
            stride_outm, threshold, rescale, STAGE, ACTIVATION, PAIRED, BLOCK_R, widths, scale,
            scale_ptr,
        )  # fmt: skip
    else:
        part_ptr = out_ptr + pid_k.to(tl.int64) * M * R
        mask = mask_m[:, None] & mask_r[None, :]
        tl.store(part_ptr + offs_m[:, None] * R + offs_r[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["M", "parts", "threshold"])
def _finish(
    part_ptr, bias_ptr, z_ptr, out_ptr, h_ptr, seed_ptr, scale_ptr,
    M, R, widths, parts,
    stride_zm, stride_outm,
    scale, threshold, rescale,
    STAGE: tl.constexpr, ACTIVATION: tl.constexpr, PAIRED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_r = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start_r = pid_r * BLOCK_R
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = start_r + tl.arange(0, BLOCK_R)
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    part_ptrs = part_ptr + offs_m[:, None] * R + offs_r[None, :]

    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for _ in range(parts):
        acc += tl.load(part_ptrs, mask=mask, other=0.0)
        part_ptrs += tl.cast(M, tl.int64) * R

    finish_hidden(
        acc, bias_ptr, z_ptr, out_ptr, h_ptr, seed_ptr, offs_m, start_r, M, R, stride_zm,
        stride_outm, threshold, rescale, STAGE, ACTIVATION, PAIRED, BLOCK_R, widths, scale,
        scale_ptr,
    )  # fmt: skip


def shrink(
    x: torch.Tensor,
    f: torch.Tensor,
    *,
    config: Config,
    stage: str = "linear",
    bias: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    activation: str = "identity",
    dropout: Dropout = NO_DROPOUT,
    with_h: bool = False,
    widths: tuple[int, ...] | None = None,
    out: torch.Tensor | None = None,
    scale: Scale | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return `out`, written where it is given, and, if asked for, `h`.

    Dropout falls on x in the linear stage, on the hidden units in the others; `widths` belong to
    the forward stage.
    """
    (M, K), R = x.shape, f.shape[0]
    out = x.new_empty(M, R, dtype=torch.float32) if out is None else out
    h = x.new_empty(M, R) if with_h else None
    if M == 0:
        return out, h
    parts = out if config.split == 1 else x.new_empty(config.split, M, R, dtype=torch.float32)
    number, scale_ptr = scale or (None, None)
    drawn = (K,) if stage == "linear" else widths or (R,)
    seed, threshold, rescale, paired = dropout.arguments(M, *drawn)
    _shrink[(cdiv(M, config.block_m) * cdiv(R, config.block_r), config.split)](
        x, f, contiguous(bias), z, parts, h, seed, scale_ptr,
        M, K, R, widths,
        *x.stride(), *f.stride(), strides(z)[0], out.stride(0),
        number, threshold, rescale,
        stage, activation, paired, K % config.block_k == 0,
        config.split, config.block_m, config.block_k, config.block_r,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if config.split > 1:
        finish(parts, out, h, stage=stage, bias=bias, z=z, activation=activation, dropout=dropout,
               widths=widths, scale=scale)  # fmt: skip
    return out, h


def finish(
    parts: torch.Tensor,
    out: torch.Tensor,
    h: torch.Tensor | None = None,
    *,
    stage: str,
    z: torch.Tensor | None,
    activation: str,
    dropout: Dropout,
    scale: Scale | None,
    bias: torch.Tensor | None = None,
    widths: tuple[int, ...] | None = None,
) -> None:
    """Add the [P, M, R] sums in order and take the total through its stage into `out` and `h`."""
    P, M, R = parts.shape
    block_r = min(64, whole_rank(R))
    block_m = 1024 // block_r
    number, scale_ptr = scale or (None, None)
    seed, threshold, rescale, paired = dropout.arguments(M, *(widths or (R,)))
    _finish[(cdiv(M, block_m), cdiv(R, block_r))](
        parts, contiguous(bias), z, out, h, seed, scale_ptr,
        M, R, widths, P,
        strides(z)[0], out.stride(0),
        number, threshold, rescale,
        stage, activation, paired, block_m, block_r,
        num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
