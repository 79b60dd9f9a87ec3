"""Backward of the expand: one read of dY gives the hidden gradient `dY B` and B's, `dYᵀ S`.

    linear    dS = dY B                           dB = dYᵀ S
    backward  dz = (dY U) · mask · act'(z)        dU = dYᵀ h,  h = dropout(act(z))

| name    | shape  | dtype                   | strides    |
| dy      | [M, N] | fp16, bf16, fp32        | any        |
| b       | [N, R] | any float, cast to dy's | any        |
| s or z  | [M, R] | fp32, saved             | rows in a wider matrix |
| out     | [M, R] | fp32: dS or dz          | rows in a wider matrix |
| db      | [P, N, R] | fp32, one part for each block of rows | contiguous |
| columns | [P, N] | fp32, column sums of dY | contiguous |

A program keeps its block of rows of the hidden gradient in registers while it walks along N, and
stores one part of dB for each step; `sum_parts` adds the parts in a fixed order, so the result
does not depend on scheduling. S (or h) and B are rounded to dy's dtype, sums are fp32. The scale
is left out: it multiplies the finished sums; `out` takes one where its next reader adds several
of different scales. 4·M·N·R FLOPs; bytes: dY once, and 8·N·R·⌈M / BLOCK_M⌉ for the parts, which
is why it serves small ranks: with many rows two kernels that each read dY are cheaper from about
rank 32 on (`tuning.one_read`), and beyond 64 the hidden gradient does not fit the registers.
"""

import torch
import triton
import triton.language as tl

from ...core.tiling import Config, cdiv, whole_rank
from .arguments import NO_DROPOUT, Dropout, Scale
from .hidden import finish_hidden, hidden_units
from .shrink import finish


@triton.jit(do_not_specialize=["M", "threshold"])
def _expand_backward(
    dy_ptr, b_ptr, z_ptr, out_ptr, db_ptr, columns_ptr, seed_ptr, scale_ptr,
    M, N, R,
    stride_dym, stride_dyn, stride_bn, stride_br, stride_zm, stride_outm,
    scale, threshold, rescale,
    STAGE: tl.constexpr, ACTIVATION: tl.constexpr, PAIRED: tl.constexpr, EVEN_N: tl.constexpr,
    SPLIT_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunk = tl.cdiv(tl.cdiv(N, BLOCK_N), SPLIT_N) * BLOCK_N
    start_n = pid_n * chunk
    end_n = min(N, start_n + chunk)

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m, mask_r = offs_m < M, offs_r < R
    mask_hidden = mask_m[:, None] & mask_r[None, :]
    dy_ptrs = dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :] * stride_dyn
    b_ptrs = b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br
    db_ptrs = db_ptr + pid_m * N * R + offs_n[:, None] * R + offs_r[None, :]

    z_ptrs = z_ptr + offs_m[:, None] * stride_zm + offs_r[None, :]
    s = tl.load(z_ptrs, mask=mask_hidden, other=0.0)
    if STAGE == "backward":
        s = hidden_units(s, offs_m, 0, R, seed_ptr, threshold, rescale, ACTIVATION, PAIRED, BLOCK_R)
    s = s.to(dy_ptr.dtype.element_ty)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for n in range(start_n, end_n, BLOCK_N):
        mask_n = n + tl.arange(0, BLOCK_N) < end_n
        mask_dy, mask_b = mask_m[:, None], mask_r[None, :]
        if not EVEN_N:
            mask_dy, mask_b = mask_dy & mask_n[None, :], mask_b & mask_n[:, None]
        dy = tl.load(dy_ptrs, mask=mask_dy, other=0.0)
        b = tl.load(b_ptrs, mask=mask_b, other=0.0).to(dy.dtype)
        acc = tl.dot(dy, b, acc, input_precision="ieee")
        tl.store(db_ptrs, tl.dot(tl.trans(dy), s, input_precision="ieee"), mask=mask_b)
        if columns_ptr is not None:
            offs_columns = pid_m * N + n + tl.arange(0, BLOCK_N)
            tl.store(columns_ptr + offs_columns, tl.sum(dy.to(tl.float32), 0), mask=mask_n)
        dy_ptrs += BLOCK_N * stride_dyn
        b_ptrs += BLOCK_N * stride_bn
        db_ptrs += BLOCK_N * R

    if SPLIT_N == 1:
        finish_hidden(
            acc, None, z_ptr, out_ptr, None, seed_ptr, offs_m, 0, M, R, stride_zm, stride_outm,
            threshold, rescale, STAGE, ACTIVATION, PAIRED, BLOCK_R, None, scale, scale_ptr,
        )  # fmt: skip
    else:
        part_ptr = out_ptr + pid_n.to(tl.int64) * M * R
        tl.store(part_ptr + offs_m[:, None] * R + offs_r[None, :], acc, mask=mask_hidden)


def expand_backward(
    dy: torch.Tensor,
    b: torch.Tensor,
    z: torch.Tensor,
    *,
    config: Config,
    stage: str = "linear",
    activation: str = "identity",
    dropout: Dropout = NO_DROPOUT,
    with_columns: bool = False,
    out: torch.Tensor | None = None,
    scale: Scale | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the hidden gradient [M, R], the parts of dB [P, N, R] and of dY's column sums [P, N].

    The first is scaled, and written to `out`, where these are given. `z` is S in the linear stage;
    dropout (of the hidden units) belongs to the backward stage.
    """
    (M, N), R = dy.shape, b.shape[1]
    P = cdiv(M, config.block_m)
    out = dy.new_empty(M, R, dtype=torch.float32) if out is None else out
    db = dy.new_empty(P, N, R, dtype=torch.float32)
    columns = dy.new_empty(P, N, dtype=torch.float32) if with_columns else None
    if M == 0:
        return out, db, columns
    sums = out if config.split == 1 else dy.new_empty(config.split, M, R, dtype=torch.float32)
    number, scale_ptr = scale or (None, None)
    seed, threshold, rescale, paired = dropout.arguments(M, R)
    _expand_backward[(P, config.split)](
        dy, b, z, sums, db, columns, seed, scale_ptr,
        M, N, R,
        *dy.stride(), *b.stride(), z.stride(0), out.stride(0),
        number, threshold, rescale,
        stage, activation, paired, N % config.block_n == 0,
        config.split, config.block_m, config.block_n, whole_rank(R),
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if config.split > 1:
        finish(
            sums, out, stage=stage, z=z, activation=activation, dropout=dropout, scale=scale
        )  # fmt: skip
    return out, db, columns
