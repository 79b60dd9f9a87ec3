"""`y = x Wᵀ + bias + s·(x Aᵀ) Bᵀ` in one kernel: both products of x run in the same main loop.

| name | shape  | dtype                  | strides    |
| x    | [M, K] | fp16, bf16, fp32       | any        |
| w    | [N, K] | x's                    | any        |
| a    | [R, K] | any float, cast to x's | any        |
| b    | [N, R] | any float, cast to x's | any        |
| bias | [N]    | any float              | contiguous |
| y    | [M, N] | x's                    | contiguous |
| s    | [M, R] | fp32, x Aᵀ             | contiguous |

Accumulates in fp32; `x Aᵀ` and B are rounded to x's dtype for their product, the scale multiplies
in fp32. 2·M·N·(K + R) + 2·M·K·R·⌈N / BLOCK_N⌉ FLOPs: `x Aᵀ` is computed again in every column of
tiles, in exchange for one launch and no second read of x. That wins where N is small, or rows
are few and A is small beside W. No dropout (its mask would be drawn again in every column of tiles
too), rank at most 64 (a second accumulator lives beside the first).
"""

import torch
import triton
import triton.language as tl

from ...core.tiles import effective_scale, grouped_tile
from ...core.tiling import Config, cdiv, whole_rank
from .arguments import UNSCALED, Scale, contiguous


@triton.jit(do_not_specialize=["M"])
def _one_pass(
    x_ptr, w_ptr, a_ptr, b_ptr, bias_ptr, y_ptr, s_ptr, scale_ptr,
    M, N, K, R,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    scale,
    EVEN_K: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = grouped_tile(tl.program_id(0), tiles_m, tiles_n, GROUP_M)

    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, offs_r < R
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = w_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
    a_ptrs = a_ptr + offs_k[:, None] * stride_ak + offs_r[None, :] * stride_ar

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_x, mask_w, mask_a = mask_m[:, None], mask_n[None, :], mask_r[None, :]
        if not EVEN_K:
            mask_k = k + tl.arange(0, BLOCK_K) < K
            mask_x = mask_x & mask_k[None, :]
            mask_w, mask_a = mask_w & mask_k[:, None], mask_a & mask_k[:, None]
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        w = tl.load(w_ptrs, mask=mask_w, other=0.0)
        a = tl.load(a_ptrs, mask=mask_a, other=0.0).to(x.dtype)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        acc_s = tl.dot(x, a, acc_s, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk
        a_ptrs += BLOCK_K * stride_ak

    dtype = x_ptr.dtype.element_ty
    b_ptrs = b_ptr + offs_r[:, None] * stride_br + offs_n[None, :] * stride_bn
    b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0).to(dtype)
    low = tl.dot(acc_s.to(dtype), b, input_precision="ieee")
    acc += low * effective_scale(scale, scale_ptr)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(dtype), mask=mask_m[:, None] & mask_n[None, :])
    if pid_n == 0:
        s_ptrs = s_ptr + offs_m[:, None] * R + offs_r[None, :]
        tl.store(s_ptrs, acc_s, mask=mask_m[:, None] & mask_r[None, :])


def one_pass(
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    config: Config,
    bias: torch.Tensor | None = None,
    scale: Scale = UNSCALED,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y [M, N] in x's dtype and s = x Aᵀ [M, R] in fp32."""
    (M, K), N, R = x.shape, weight.shape[0], a.shape[0]
    y = x.new_empty(M, N)
    s = x.new_empty(M, R, dtype=torch.float32)
    if M == 0:
        return y, s
    _one_pass[(cdiv(M, config.block_m) * cdiv(N, config.block_n),)](
        x, weight, a, b, contiguous(bias), y, s, scale.tensor,
        M, N, K, R,
        *x.stride(), *weight.stride(), *a.stride(), *b.stride(),
        scale.number,
        K % config.block_k == 0, 8,
        config.block_m, config.block_n, config.block_k, whole_rank(R),
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return y, s
