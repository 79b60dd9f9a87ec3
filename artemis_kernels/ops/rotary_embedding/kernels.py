"""Heads turned by their positions, q's and k's in one launch.

    forward    y₁ = x₁·cos₁ − x₂·sin₁    y₂ = x₂·cos₂ + x₁·sin₂    of the halves of a head
    backward   y₁ = x₁·cos₁ + x₂·sin₂    y₂ = x₂·cos₂ − x₁·sin₁

| name     | shape             | dtype            | strides                                |
| q, k     | [B, H or G, T, D] | fp16, bf16, fp32 | any but the last, which is 1           |
| cos, sin | [B or 1, T, D]    | any float        | contiguous                             |
| yq, yk   | q's and k's       | theirs           | as [B, H, T, D], backward [B, T, H, D] |

A program takes some heads of one position, of q or of k. Bytes: q and k read and written once, cos
and sin once for each BLOCK_H heads (from the cache).
"""

import torch
import triton
import triton.language as tl

from ...core.tiling import cdiv, next_power_of_2

PAIRS, HEADS, WARPS = 1024, 32, 2  # of a program, at most


@triton.jit
def _turn(
    x_ptr, y_ptr, cos_ptr, sin_ptr,
    b, t, offs_h, offs_i,
    H, T, stride_xb, stride_xh, stride_xt,
    HALF: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    mask_i = offs_i < HALF
    cos_1 = tl.load(cos_ptr + offs_i, mask=mask_i, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos_ptr + HALF + offs_i, mask=mask_i, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin_ptr + offs_i, mask=mask_i, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin_ptr + HALF + offs_i, mask=mask_i, other=0.0).to(tl.float32)[None, :]

    mask = (offs_h < H)[:, None] & mask_i[None, :]
    x_ptrs = x_ptr + b * stride_xb + t * stride_xt + offs_h[:, None] * stride_xh + offs_i[None, :]
    x_1 = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    x_2 = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    if BACKWARD:
        y_1 = x_1 * cos_1 + x_2 * sin_2
        y_2 = x_2 * cos_2 - x_1 * sin_1
        rows = (b * T + t) * H + offs_h
    else:
        y_1 = x_1 * cos_1 - x_2 * sin_1
        y_2 = x_2 * cos_2 + x_1 * sin_2
        rows = (b * H + offs_h) * T + t
    y_ptrs = y_ptr + rows[:, None] * (2 * HALF) + offs_i[None, :]
    tl.store(y_ptrs, y_1.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptrs + HALF, y_2.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "H", "G"])
def _rotary(
    q_ptr, k_ptr, cos_ptr, sin_ptr, yq_ptr, yk_ptr,
    H, G, T,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_table,
    HALF: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    position, pid_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    blocks_q = tl.cdiv(H, BLOCK_H)

    b, t = position // T, position % T
    offs_i = tl.arange(0, BLOCK_I)
    cos_ptr += b * stride_table + t * (2 * HALF)
    sin_ptr += b * stride_table + t * (2 * HALF)
    if pid_h < blocks_q:
        offs_h = pid_h.to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
        _turn(
            q_ptr, yq_ptr, cos_ptr, sin_ptr, b, t, offs_h, offs_i, H, T,
            stride_qb, stride_qh, stride_qt, HALF, BACKWARD,
        )  # fmt: skip
    else:
        offs_h = (pid_h - blocks_q).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
        _turn(
            k_ptr, yk_ptr, cos_ptr, sin_ptr, b, t, offs_h, offs_i, G, T,
            stride_kb, stride_kh, stride_kt, HALF, BACKWARD,
        )  # fmt: skip


def forward(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, T, D] and k [B, G, T, D] turned, contiguous: as attention multiplies them."""
    yq, yk = q.new_empty(q.shape), k.new_empty(k.shape)
    _launch(q, k, cos, sin, yq, yk, False)
    return yq, yk


def backward(
    dq: torch.Tensor, dk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of q and k, in memory as [B, T, H, D]: as the projections write them."""
    (B, H, T, D), G = dq.shape, dk.shape[1]
    yq, yk = dq.new_empty(B, T, H, D), dk.new_empty(B, T, G, D)
    _launch(dq, dk, cos, sin, yq, yk, True)
    return yq.transpose(1, 2), yk.transpose(1, 2)


def _launch(q, k, cos, sin, yq, yk, backward: bool) -> None:
    if yq.numel() + yk.numel() == 0:
        return
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    (B, H, T, D), G = q.shape, k.shape[1]
    block_i = next_power_of_2(D // 2)
    block_h = min(max(PAIRS // block_i, 1), HEADS)
    _rotary[(B * T, cdiv(H, block_h) + cdiv(G, block_h))](
        q, k, cos.contiguous(), sin.contiguous(), yq, yk,
        H, G, T,
        *q.stride()[:3], *k.stride()[:3], 0 if len(cos) == 1 else T * D,
        D // 2, backward, block_h, block_i,
        num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
