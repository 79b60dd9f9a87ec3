"""Backward of the shrink and every other sum over rows: `dF = dSᵀ x̃`, and x's column sums.

    dA = dSᵀ dropout(x)      dD = dzᵀ x      dU = dYᵀ h, as (hᵀ dY)ᵀ

| name    | shape     | dtype                   | strides    |
| x       | [M, K]    | fp16, bf16, fp32        | any        |
| s       | [M, R]    | any float, cast to x's  | rows in a wider matrix |
| df      | [P, R, K] | fp32, one part for each share of the rows | contiguous |
| columns | [P, K]    | fp32, column sums of x  | contiguous |

Sums are fp32, S is rounded to x's dtype, the mask is drawn again from the seed. 2·M·K·R FLOPs;
bytes: x once for each BLOCK_R rows of F, S once for each BLOCK_K columns. The rows are shared out
to `split` parts to fill the chip, and `sum_parts` adds them in a fixed order, so the result does
not depend on scheduling.
"""

import torch
import triton
import triton.language as tl

from ...core.tiling import Config, cdiv
from .arguments import NO_DROPOUT, Dropout
from .over_rows import over_rows


@triton.jit(do_not_specialize=["M", "threshold"])
def _shrink_backward(
    x_ptr, s_ptr, df_ptr, columns_ptr, seed_ptr,
    M, K, R,
    stride_xm, stride_xk, stride_sm,
    threshold, rescale,
    PAIRED: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    start_k, pid_r, part = tl.program_id(0) * BLOCK_K, tl.program_id(1), tl.program_id(2)

    offs_k = start_k + tl.arange(0, BLOCK_K).to(tl.int64)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    mask_k, mask_r = offs_k < K, offs_r < R
    acc, columns = over_rows(
        x_ptr, s_ptr, seed_ptr, start_k, offs_r, part, M, K, R, stride_xm, stride_xk, stride_sm,
        threshold, "" if columns_ptr is None else "x", PARTS, PAIRED, BLOCK_M, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    if seed_ptr is not None:
        acc *= tl.cast(rescale, tl.float32)
    df_ptrs = df_ptr + (part.to(tl.int64) * R + offs_r)[None, :] * K + offs_k[:, None]
    tl.store(df_ptrs, acc, mask=mask_k[:, None] & mask_r[None, :])
    if columns_ptr is not None and pid_r == 0:
        tl.store(columns_ptr + part.to(tl.int64) * K + offs_k, columns, mask=mask_k)


def shrink_backward(
    x: torch.Tensor,
    s: torch.Tensor,
    *,
    config: Config,
    dropout: Dropout = NO_DROPOUT,
    with_columns: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the parts of `Sᵀ dropout(x)` [P, R, K] and of x's column sums [P, K], undropped."""
    (M, K), R = x.shape, s.shape[1]
    P = config.split if M else 0
    df = x.new_empty(P, R, K, dtype=torch.float32)
    columns = x.new_empty(P, K, dtype=torch.float32) if with_columns else None
    if M == 0:
        return df, columns
    tiles_r = max(cdiv(R, config.block_r), 1)  # x's columns are summed at any rank
    seed, threshold, rescale, paired = dropout.arguments(M, K)
    _shrink_backward[(cdiv(K, config.block_k), tiles_r, P)](
        x, s, df, columns, seed,
        M, K, R,
        *x.stride(), s.stride(0),
        threshold, rescale,
        paired, P, config.block_m, config.block_k, config.block_r,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return df, columns
