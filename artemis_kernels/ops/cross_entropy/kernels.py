"""Cross entropy of rows of logits, one program a row.

    forward    most, Σ e^(x − most) in one read, by rescaling the sum whenever `most` grows
    backward   dx = (e^(x − most − log_sum) − [j = target])·d

| name   | shape  | dtype            | strides    |
| x      | [M, N] | fp16, bf16, fp32 | any        |
| target | [M]    | int64            | contiguous |
| losses | [M]    | fp32             | contiguous |
| kept   | [M, 2] | fp32: most, log_sum | contiguous |
| d      | [M]    | fp32             | contiguous |
| dx     | [M, N] | x's              | contiguous |

Bytes: x once forward; x and dx once backward.
A target outside [0, N) that is not the ignored one gives nan.
"""

import torch
import triton
import triton.language as tl

from ...core.tiling import next_power_of_2

BLOCK, WARPS = 4096, 8


@triton.jit(do_not_specialize=["ignored"])
def _forward(
    x_ptr, target_ptr, losses_ptr, kept_ptr,
    N, ignored,
    stride_xm, stride_xn,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * stride_xm
    lanes = tl.arange(0, BLOCK_N)

    most = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for n in range(0, N, BLOCK_N):
        offs_n = n + lanes.to(tl.int64)
        mask_n = offs_n < N
        x = tl.load(x_row + offs_n * stride_xn, mask=mask_n, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(most, tl.max(x, 0))
        # Where nothing but -inf has been read, -inf minus itself must not become nan.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(most - base) + tl.sum(tl.exp(x - base), 0)
        most = larger

    log_sum = tl.log(total)
    target = tl.load(target_ptr + row)
    exists = (target >= 0) & (target < N)
    at_target = tl.load(x_row + target * stride_xn, mask=exists, other=float("nan"))
    loss = log_sum - (at_target.to(tl.float32) - most)
    tl.store(losses_ptr + row, tl.where(target == ignored, 0.0, loss))
    tl.store(kept_ptr + 2 * row, most)
    tl.store(kept_ptr + 2 * row + 1, log_sum)


@triton.jit(do_not_specialize=["ignored"])
def _backward(
    x_ptr, target_ptr, kept_ptr, d_ptr, dx_ptr,
    N, ignored,
    stride_xm, stride_xn,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_N)
    target = tl.load(target_ptr + row)
    most, log_sum = tl.load(kept_ptr + 2 * row), tl.load(kept_ptr + 2 * row + 1)
    d = tl.load(d_ptr + row)
    exists = (target >= 0) & (target < N)
    d = tl.where(exists | (target == ignored), d, float("nan"))
    for n in range(0, N, BLOCK_N):
        offs_n = n + lanes.to(tl.int64)
        mask_n = offs_n < N
        x_ptrs = x_ptr + row * stride_xm + offs_n * stride_xn
        x = tl.load(x_ptrs, mask=mask_n, other=0.0).to(tl.float32)
        p = tl.exp(x - most - log_sum) - tl.where(offs_n == target, 1.0, 0.0)
        dx = tl.where(target == ignored, 0.0, p * d)
        tl.store(dx_ptr + row * N + offs_n, dx.to(dx_ptr.dtype.element_ty), mask=mask_n)


def forward(
    x: torch.Tensor, target: torch.Tensor, ignored: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [M] and (most, log_sum) of each row [M, 2] for x [M, N]."""
    M, N = x.shape
    losses = x.new_empty(M, dtype=torch.float32)
    kept = x.new_empty(M, 2, dtype=torch.float32)
    if M:
        _forward[(M,)](
            x, target, losses, kept,
            N, ignored,
            *x.stride(),
            _block(N),
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return losses, kept


def backward(
    d: torch.Tensor, x: torch.Tensor, target: torch.Tensor, kept: torch.Tensor, ignored: int
) -> torch.Tensor:
    """x's gradient [M, N], in its dtype, for d [M] of the losses."""
    M, N = x.shape
    dx = x.new_empty(M, N)
    if M:
        _backward[(M,)](
            x, target, kept, d.contiguous(), dx,
            N, ignored,
            *x.stride(),
            _block(N),
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return dx


def _block(n: int) -> int:
    return min(BLOCK, max(next_power_of_2(n), 16))
