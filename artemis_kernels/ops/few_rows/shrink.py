"""`S = x Fᵀ` of one to four rows and what follows it, in one launch: a program a few rows of F.

The linear and the forward stage of `low_rank.shrink`, whose table of tensors this is but for F,
whose rows lie along K; there is no dropout. F is not rounded. With few rows x, and F of a low rank,
are so small that the time is that of a few loads one after the other: K is not cut into parts,
which another launch would have to add.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ...core.tiling import Config, cdiv, next_power_of_2
from ..low_rank.hidden import finish_hidden
from .matvec import weight_arguments
from .sums import row_sums


@triton.jit(do_not_specialize=["M"])
def _shrink_rows(
    x_ptr, w_ptr, bias_ptr, out_ptr, h_ptr,
    M, R, columns,
    stride_xm, stride_xk, stride_wn, stride_outm,
    FORMAT: tl.constexpr, HALF: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
    STAGE: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    start_r = tl.program_id(0) * BLOCK_R
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    rows_r = tl.minimum(start_r + tl.arange(0, BLOCK_R), R - 1).to(tl.int64)
    acc = row_sums(
        x_ptr, w_ptr, None, None, rows_r, M, columns, stride_xm, stride_xk, stride_wn, FORMAT, HALF,
        EVEN, STAGES, BLOCK_M, BLOCK_R, BLOCK_B,
    )  # fmt: skip
    finish_hidden(
        acc, bias_ptr, None, out_ptr, h_ptr, None, offs_m, start_r, M, R, 0, stride_outm, 0, 1.0,
        STAGE, ACTIVATION, False, BLOCK_R,
    )  # fmt: skip


def shrink_rows(
    x: torch.Tensor,
    f: torch.Tensor,
    *,
    config: Config,
    stage: str = "linear",
    bias: torch.Tensor | None = None,
    activation: str = "identity",
    with_h: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return S, or z, [M, R] in fp32 and, if asked for, h [M, R] in x's dtype."""
    if x.shape[0] == 0:
        empty = x.new_empty(0, f.shape[0])
        return empty.float(), empty if with_h else None
    return prepared(f, x.shape[0], config, stage, bias, activation, with_h)(x)


def prepared(
    f: torch.Tensor, rows: int, config: Config, stage: str = "linear",
    bias: torch.Tensor | None = None, activation: str = "identity", with_h: bool = False,
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]:  # fmt: skip
    """`shrink_rows` of any x of so many rows: what does not depend on it is made once."""
    R = f.shape[0]
    grid = (cdiv(R, config.block_n),)
    fixed = {
        "bias_ptr": None if bias is None else bias.contiguous(), "M": rows, "R": R,
        "STAGE": stage, "ACTIVATION": activation, "STAGES": config.stages,
        "BLOCK_M": next_power_of_2(rows), "BLOCK_R": config.block_n, "num_warps": config.warps,
        "enable_fp_fusion": True, **weight_arguments(f, config.block_k),
    }  # fmt: skip
    for unused in ("group_scale_ptr", "group_offset_ptr", "column_ptr"):
        del fixed[unused]

    def launch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        out = x.new_empty(rows, R, dtype=torch.float32)
        h = x.new_empty(rows, R) if with_h else None
        _shrink_rows[grid](
            x_ptr=x, out_ptr=out, h_ptr=h, stride_xm=x.stride(0), stride_xk=x.stride(1),
            stride_outm=R, **fixed,
        )  # fmt: skip
        return out, h

    return launch
