"""The end of a split sum: `out = s·Σ_p parts[p]` in a fixed order, and `Σ parts ⊙ other`.

| name  | shape     | dtype | strides    |
| parts | [P, A, B] | fp32  | contiguous |
| out   | [A, B]    | any float | any    |
| other | [A, B]    | any float | any    |

The second result is the gradient of a scale: with `y = s·(S Bᵀ)`, `ds = Σ (dYᵀ S) ⊙ B`. Sums are
fp32 and rounded once, at the store. Bytes: the parts once, out once, other once.
"""

import torch
import triton
import triton.language as tl

from ...core.tiles import effective_scale
from ...core.tiling import cdiv
from .arguments import UNSCALED, Scale, strides

_BLOCK_P = 16
_BLOCK = 128


@triton.jit(do_not_specialize=["P"])
def _sum_parts(
    part_ptr, other_ptr, out_ptr, dots_ptr, scale_ptr,
    P, A, B,
    stride_other_a, stride_other_b, stride_out_a, stride_out_b,
    scale,
    BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)

    offs = pid * BLOCK + tl.arange(0, BLOCK)
    offs_p = tl.arange(0, BLOCK_P)
    mask = offs < tl.cast(A, tl.int64) * B
    offs_a, offs_b = offs // B, offs % B
    part_ptrs = part_ptr + offs_p.to(tl.int64)[:, None] * A * B + offs[None, :]

    acc = tl.zeros([BLOCK], tl.float32)
    for p in range(0, P, BLOCK_P):
        part = tl.load(part_ptrs, mask=(p + offs_p < P)[:, None] & mask[None, :], other=0.0)
        acc += tl.sum(part, 0)
        part_ptrs += tl.cast(A, tl.int64) * B * BLOCK_P

    out = acc * effective_scale(scale, scale_ptr)
    out_ptrs = out_ptr + offs_a * stride_out_a + offs_b * stride_out_b
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)
    if dots_ptr is not None:
        other_ptrs = other_ptr + offs_a * stride_other_a + offs_b * stride_other_b
        other = tl.load(other_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dots_ptr + pid, tl.sum(acc * other))


def sum_parts(
    parts: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: Scale = UNSCALED,
    other: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Write `s·Σ parts` into `out`; return `Σ parts ⊙ other`, unscaled, as a 0-d fp32 tensor."""
    P, A, B = parts.shape
    blocks = cdiv(A * B, _BLOCK)
    dots = None if other is None else parts.new_empty(blocks)
    _sum_parts[(blocks,)](
        parts, other, out, dots, scale.tensor,
        P, A, B,
        *strides(other), *out.stride(),
        scale.number,
        _BLOCK_P, _BLOCK,
        num_warps=4, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    return None if dots is None else dots.sum()
