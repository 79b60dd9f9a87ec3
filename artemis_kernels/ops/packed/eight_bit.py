"""8-bit numbers times 8-bit numbers: `q Wqᵀ` on the tensor cores, and its epilogue.

| name | shape  | dtype              | strides |
| q    | [M, K] | int8 or e4m3       | any     |
| w    | [N, K] | the same           | any     |
| y    | [M, N] | fp16, bf16 or fp32 | contiguous |

int8 sums are exact in int32; e4m3 sums are fp32, but Hopper's tensor cores add with about 14 bits:
`precise` has them emptied into fp32 registers after every step of the loop, for gradients and long
sums (DeepSeek-V3, arXiv 2412.19437, §3.3.2). Scales multiply in the epilogue only.

2·M·N·K operations at twice the 16-bit rate; bytes q, W, y once. Tensor cores take both 8-bit
operands along K; the caller hands over a w whose last stride is 1 (for dX: a transposed copy).
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ...core.tiles import grouped_tile
from ...core.tiling import Config, cdiv
from .epilogue import Epilogue, finish_tile


@triton.jit(do_not_specialize=["M", "threshold"])
def _eight_bit(
    q_ptr, w_ptr, row_ptr, column_ptr, xa_ptr, wa_ptr, peak_ptr, at_ptr, lines_ptr, s_ptr, b_ptr,
    bias_ptr, bias_low_ptr, residual_ptr, y_ptr, seed_ptr, scale_ptr,
    M, N, R, A, K,
    stride_qm, stride_qk, stride_wn, stride_wk, stride_wan, stride_waa, stride_lk, stride_ln,
    stride_sm, stride_bn, stride_br,
    scale, threshold, rescale,
    PRECISE: tl.constexpr, EVEN_K: tl.constexpr, PAIRED: tl.constexpr, RANK_BLOCKS: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = grouped_tile(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    start_n = pid_n * BLOCK_N
    sums: tl.constexpr = tl.int32 if q_ptr.dtype.element_ty == tl.int8 else tl.float32

    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m, mask_n = offs_m < M, offs_n < N
    q_ptrs = q_ptr + offs_m[:, None] * stride_qm + offs_k[None, :] * stride_qk
    w_ptrs = w_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn

    acc = tl.zeros([BLOCK_M, BLOCK_N], sums)
    for k in range(0, K, BLOCK_K):
        mask_q, mask_w = mask_m[:, None], mask_n[None, :]
        if not EVEN_K:
            mask_k = k + tl.arange(0, BLOCK_K) < K
            mask_q, mask_w = mask_q & mask_k[None, :], mask_w & mask_k[:, None]
        q = tl.load(q_ptrs, mask=mask_q, other=0.0)
        w = tl.load(w_ptrs, mask=mask_w, other=0.0)
        if PRECISE:
            acc = tl.dot(q, w, acc, max_num_imprecise_acc=BLOCK_K, out_dtype=sums)
        else:
            acc = tl.dot(q, w, acc, out_dtype=sums)
        q_ptrs += BLOCK_K * stride_qk
        w_ptrs += BLOCK_K * stride_wk

    finish_tile(
        acc.to(tl.float32), row_ptr, column_ptr, xa_ptr, wa_ptr, peak_ptr, at_ptr, lines_ptr, s_ptr,
        b_ptr, bias_ptr, bias_low_ptr, residual_ptr, y_ptr, seed_ptr, scale_ptr, offs_m, start_n, M,
        N, R, A, stride_wan, stride_waa, stride_lk, stride_ln, stride_sm, stride_bn, stride_br,
        scale, threshold, rescale, PAIRED, RANK_BLOCKS, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip


def eight_bit(
    q: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    epilogue: Epilogue,
    *,
    config: Config,
    precise: bool = False,
) -> None:
    """Write `q Wᵀ` through the epilogue into y [M, N]."""
    (M, K), N = q.shape, w.shape[0]
    if M == 0:
        return
    crowded = epilogue.residual is not None or epilogue.peaks is not None
    if crowded and config.block_n > 128:  # beside so wide a tile they spill
        config = replace(config, block_n=128)
    pointers, sizes, steps, numbers, paired = epilogue.arguments(y)
    _eight_bit[(cdiv(M, config.block_m) * cdiv(N, config.block_n),)](
        q, w, *pointers,
        *sizes, K,
        *q.stride(), *w.stride(), *steps,
        *numbers,
        precise and q.dtype != torch.int8, K % config.block_k == 0,
        paired, epilogue.rank_blocks(config.block_r), 8,
        config.block_m, config.block_n, config.block_k, config.block_r,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
