"""What follows a product with a packed weight: scales, what is apart, the low-rank term, biases.

    y = acc·row·column + xa Waᵀ + s·(mask·(S Bᵀ) + bias_low) + peak·lines[at] + bias + residual

| name           | shape     | dtype                      | strides    |
| acc or parts   | [P, M, N] | fp32 or int32, P sums      | contiguous |
| row            | [M]       | fp32                       | contiguous |
| column         | [N]       | fp32                       | contiguous |
| xa             | [M, A]    | y's; A at most 16          | contiguous |
| wa             | [N, A]    | y's                        | any        |
| s              | [M, R]    | any float, cast to y's     | rows in a wider matrix |
| b              | [N, R]    | any float, cast to y's     | any        |
| peak, at       | [M]       | fp32, int64                | contiguous |
| lines          | [K, N]    | int8                       | any        |
| bias, bias_low | [N]       | any float                  | contiguous |
| residual       | [M, N]    | y's; may be y              | contiguous |
| y              | [M, N]    | fp16, bf16, fp32           | contiguous |

Any of them may be absent. Everything is fp32 until the store. The scale multiplies S in fp32 before
S is rounded: so, without dropout, the low-rank product needs no accumulator of its own.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...core.eight_bit_rows import Peaks
from ...core.tiles import effective_scale, keep_mask
from ...core.tiling import Config, cdiv
from ..low_rank.arguments import (
    NO_DROPOUT,
    UNSCALED,
    Dropout,
    Scale,
    contiguous,
    strides,
)

MOST_APART = 16  # columns: one step of a dot


@triton.jit
def finish_tile(
    acc, row_ptr, column_ptr, xa_ptr, wa_ptr, peak_ptr, at_ptr, lines_ptr, s_ptr, b_ptr, bias_ptr,
    bias_low_ptr, residual_ptr, y_ptr, seed_ptr, scale_ptr, offs_m, start_n, M, N, R, A,
    stride_wan, stride_waa, stride_lk, stride_ln, stride_sm, stride_bn, stride_br, scale,
    threshold, rescale,
    PAIRED: tl.constexpr, RANK_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Take a tile of complete float32 sums to y and store it."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    offs_n = start_n + tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m, mask_n = offs_m < M, offs_n < N

    if row_ptr is not None:
        acc *= tl.load(row_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
    if column_ptr is not None:
        acc *= tl.load(column_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    if xa_ptr is not None:
        offs_a = tl.arange(0, 16)
        mask_a = offs_a < A
        xa_ptrs = xa_ptr + offs_m[:, None] * A + offs_a[None, :]
        wa_ptrs = wa_ptr + offs_a[:, None] * stride_waa + offs_n[None, :] * stride_wan
        xa = tl.load(xa_ptrs, mask=mask_m[:, None] & mask_a[None, :], other=0.0)
        wa = tl.load(wa_ptrs, mask=mask_a[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(xa, wa, acc, input_precision="ieee")
    if s_ptr is not None:
        sigma = effective_scale(scale, scale_ptr)
        if seed_ptr is None:
            acc = _add_low_rank(
                acc, s_ptr, b_ptr, sigma, offs_m, offs_n, M, N, R, stride_sm, stride_bn, stride_br,
                dtype, RANK_BLOCKS, BLOCK_R,
            )  # fmt: skip
        else:
            low = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            low = _add_low_rank(
                low, s_ptr, b_ptr, sigma, offs_m, offs_n, M, N, R, stride_sm, stride_bn, stride_br,
                dtype, RANK_BLOCKS, BLOCK_R,
            )  # fmt: skip
            keep = keep_mask(seed_ptr, offs_m, start_n, N, threshold, PAIRED, BLOCK_N)
            acc += tl.where(keep, low * tl.cast(rescale, tl.float32), 0.0)
        if bias_low_ptr is not None:
            bias_low = tl.load(bias_low_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            acc += (bias_low * sigma)[None, :]
    if peak_ptr is not None:  # after the mask, beside whose numbers it would spill
        peak = tl.load(peak_ptr + offs_m, mask=mask_m, other=0.0)
        at = tl.load(at_ptr + offs_m, mask=mask_m, other=0)
        lines_ptrs = lines_ptr + at[:, None] * stride_lk + offs_n[None, :] * stride_ln
        lines = tl.load(lines_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        acc += peak[:, None] * lines.to(tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    offs = offs_m[:, None] * N + offs_n[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, acc.to(dtype), mask=mask)


@triton.jit
def _add_low_rank(
    acc, s_ptr, b_ptr, sigma, offs_m, offs_n, M, N, R, stride_sm, stride_bn, stride_br,
    dtype: tl.constexpr, RANK_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`acc + (σ S) Bᵀ`, float32 [BLOCK_M, BLOCK_N]."""
    mask_m, mask_n = offs_m < M, offs_n < N
    # Not unrolled: loads of all blocks at once would spill.
    for block in tl.range(0, RANK_BLOCKS, num_stages=1):
        offs_r = block * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = offs_r < R
        s_ptrs = s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :]
        b_ptrs = b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
        s = tl.load(s_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0).to(tl.float32)
        b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0).to(dtype)
        acc = tl.dot((s * sigma).to(dtype), b, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["M", "parts", "threshold"])
def _finish_product(
    part_ptr, row_ptr, column_ptr, xa_ptr, wa_ptr, peak_ptr, at_ptr, lines_ptr, s_ptr, b_ptr,
    bias_ptr, bias_low_ptr, residual_ptr, y_ptr, seed_ptr, scale_ptr,
    M, N, R, A, parts,
    stride_wan, stride_waa, stride_lk, stride_ln, stride_sm, stride_bn, stride_br,
    scale, threshold, rescale,
    PAIRED: tl.constexpr, RANK_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    start_n = tl.program_id(0) % tiles_n * BLOCK_N
    offs_m = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N).to(tl.int64)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    part_ptrs = part_ptr + offs_m[:, None] * N + offs_n[None, :]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(parts):
        acc += tl.load(part_ptrs, mask=mask, other=0).to(tl.float32)
        part_ptrs += tl.cast(M, tl.int64) * N

    finish_tile(
        acc, row_ptr, column_ptr, xa_ptr, wa_ptr, peak_ptr, at_ptr, lines_ptr, s_ptr, b_ptr,
        bias_ptr, bias_low_ptr, residual_ptr, y_ptr, seed_ptr, scale_ptr, offs_m, start_n, M, N, R,
        A, stride_wan, stride_waa, stride_lk, stride_ln, stride_sm, stride_bn, stride_br, scale,
        threshold, rescale, PAIRED, RANK_BLOCKS, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip


class Epilogue(NamedTuple):
    """What a product's sums become, as the launchers take it (see the module)."""

    s: torch.Tensor | None = None
    b: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    bias_low: torch.Tensor | None = None
    scale: Scale = UNSCALED
    dropout: Dropout = NO_DROPOUT
    row: torch.Tensor | None = None
    column: torch.Tensor | None = None
    xa: torch.Tensor | None = None
    wa: torch.Tensor | None = None
    peaks: Peaks | None = None
    lines: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.s is None else self.s.shape[1]

    def rank_blocks(self, block_r: int) -> int:
        """RANK_BLOCKS of the low-rank term, if there is one."""
        return cdiv(self.rank, block_r) if self.rank else 0

    def arguments(self, y: torch.Tensor) -> tuple[tuple, tuple, tuple, tuple, bool]:
        """A kernel's arguments for y [M, N], in its order.

        Pointers (row_ptr to scale_ptr), sizes (M to A), strides (stride_wan to stride_br), numbers
        (scale to rescale), and PAIRED.
        """
        s, b, wa, (M, N) = self.s, self.b, self.wa, y.shape
        peak, at = self.peaks or (None, None)
        seed, threshold, rescale, paired = self.dropout.arguments(M, N)
        pointers = (
            self.row, contiguous(self.column), self.xa, wa, peak, at, self.lines, s, b,
            contiguous(self.bias), contiguous(self.bias_low), self.residual, y, seed,
            self.scale.tensor,
        )  # fmt: skip
        sizes = M, N, self.rank, 0 if wa is None else wa.shape[1]
        steps = *strides(wa), *strides(self.lines), strides(s)[0], *strides(b)
        return pointers, sizes, steps, (self.scale.number, threshold, rescale), paired


def finish(parts: torch.Tensor, y: torch.Tensor, epilogue: Epilogue, *, config: Config) -> None:
    """Add the parts [P, M, N] in order and take the sum through the epilogue into y [M, N]."""
    P, M, N = parts.shape
    pointers, sizes, steps, numbers, paired = epilogue.arguments(y)
    _finish_product[(cdiv(M, config.block_m) * cdiv(N, config.block_n),)](
        parts, *pointers,
        *sizes, P,
        *steps,
        *numbers,
        paired, epilogue.rank_blocks(config.block_r),
        config.block_m, config.block_n, config.block_r,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
