"""A gated activation, element by element.

    forward    y = act(g)·u
    backward   dg = dy·u·act'(g)        du = dy·act(g)

| name     | shape   | dtype            | strides    |
| g, u, dy | [COUNT] | fp16, bf16, fp32 | contiguous |
| y        | [COUNT] | theirs           | contiguous |
| dg, du   | [COUNT] | theirs           | contiguous |

Bytes: each once; act(g) is computed again in the backward.
"""

import torch
import triton
import triton.language as tl

from ...core.tiles import activate, activation_slope
from ...core.tiling import cdiv

BLOCK, WARPS = 2048, 4


@triton.jit
def _forward(
    g_ptr, u_ptr, y_ptr,
    COUNT,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < COUNT
    g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y = activate(g, ACTIVATION) * u
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    dy_ptr, g_ptr, u_ptr, dg_ptr, du_ptr,
    COUNT,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < COUNT
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dg = dy * u * activation_slope(g, ACTIVATION)
    du = dy * activate(g, ACTIVATION)
    tl.store(dg_ptr + offs, dg.to(dg_ptr.dtype.element_ty), mask=mask)
    tl.store(du_ptr + offs, du.to(du_ptr.dtype.element_ty), mask=mask)


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """y, contiguous, in their dtype."""
    y, count = gate.new_empty(gate.shape), gate.numel()
    if count:
        _forward[(cdiv(count, BLOCK),)](
            gate.contiguous(), up.contiguous(), y,
            count,
            activation, BLOCK,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up, contiguous, in their dtype."""
    dgate, dup, count = gate.new_empty(gate.shape), up.new_empty(up.shape), gate.numel()
    if count:
        _backward[(cdiv(count, BLOCK),)](
            dy.contiguous(), gate.contiguous(), up.contiguous(), dgate, dup,
            count,
            activation, BLOCK,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return dgate, dup
