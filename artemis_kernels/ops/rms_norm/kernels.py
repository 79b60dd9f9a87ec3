"""Root mean square normalization of rows: one read of a row each way where registers hold it.

    forward    r = 1/√(Σ x²/N + eps)    y = x·r·w
    backward   dx = r·(g − x̂·Σ g·x̂/N),  g = dy·w,  x̂ = x·r        dw = Σ_rows dy·x̂

| name  | shape  | dtype             | strides    |
| x, dy | [M, N] | fp16, bf16, fp32  | any        |
| w     | [N]    | any float         | contiguous |
| y, dx | [M, N] | x's               | contiguous |
| part  | [P, N] | fp32              | contiguous |

Sums are fp32 and rounded once, at the store. Bytes: x and y once forward; x, dy and dx once
backward. A longer row is read again from the cache, a block at a time. For dw each program takes
consecutive rows, a number that depends on M alone, and `sum_parts` adds theirs in a fixed order.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...core.tiling import cdiv, next_power_of_2
from ..low_rank.sum_parts import sum_parts

# Columns in registers: the backward holds x, dy, w and dw of them.
HELD_FORWARD, HELD_BACKWARD = 16384, 8192
BLOCK = 4096  # columns at a time of a longer row
PARTS = 256  # of dw, at most


@triton.jit
def _tile(ptr, offs_m, offs_n, M, N, stride_m, stride_n):
    """[BLOCK_M, BLOCK_N] of a matrix in fp32, 0 outside."""
    ptrs = ptr + offs_m[:, None] * stride_m + offs_n[None, :] * stride_n
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _vector(w_ptr, offs_n, N):
    return tl.load(w_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store(ptr, tile, offs_m, offs_n, M, N):
    ptrs = ptr + offs_m[:, None] * N + offs_n[None, :]
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _mean(tile, N):
    """Of each row: [BLOCK_M, 1]."""
    return tl.sum(tile, 1)[:, None] / tl.cast(N, tl.float32)


@triton.jit(do_not_specialize=["M"])
def _forward(
    x_ptr, w_ptr, y_ptr,
    M, N,
    stride_xm, stride_xn,
    eps,
    HELD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK_N).to(tl.int64)
    eps = tl.cast(eps, tl.float32)

    if HELD:
        x = _tile(x_ptr, offs_m, lanes, M, N, stride_xm, stride_xn)
        y = x * tl.rsqrt(_mean(x * x, N) + eps) * _vector(w_ptr, lanes, N)
        _store(y_ptr, y, offs_m, lanes, M, N)
    else:
        squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for n in range(0, N, BLOCK_N):
            x = _tile(x_ptr, offs_m, n + lanes, M, N, stride_xm, stride_xn)
            squares += x * x
        r = tl.rsqrt(_mean(squares, N) + eps)
        for n in range(0, N, BLOCK_N):
            x = _tile(x_ptr, offs_m, n + lanes, M, N, stride_xm, stride_xn)
            _store(y_ptr, x * r * _vector(w_ptr, n + lanes, N), offs_m, n + lanes, M, N)


@triton.jit(do_not_specialize=["M", "rows"])
def _backward(
    dy_ptr, x_ptr, w_ptr, dx_ptr, part_ptr,
    M, N, rows,
    stride_dym, stride_dyn, stride_xm, stride_xn,
    eps,
    HELD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_N).to(tl.int64)
    eps = tl.cast(eps, tl.float32)

    if HELD:
        w = _vector(w_ptr, lanes, N)
        dw = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, rows, BLOCK_M):  # rows is a multiple of BLOCK_M
        offs_m = pid * rows + start + tl.arange(0, BLOCK_M)
        if HELD:
            x = _tile(x_ptr, offs_m, lanes, M, N, stride_xm, stride_xn)
            dy = _tile(dy_ptr, offs_m, lanes, M, N, stride_dym, stride_dyn)
            r = tl.rsqrt(_mean(x * x, N) + eps)
            x *= r
            dx = r * (dy * w - x * _mean(dy * w * x, N))
            _store(dx_ptr, dx, offs_m, lanes, M, N)
            if part_ptr is not None:
                dw += tl.sum(tl.where((offs_m < M)[:, None], dy * x, 0.0), 0)
        else:
            squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            along = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for n in range(0, N, BLOCK_N):
                x = _tile(x_ptr, offs_m, n + lanes, M, N, stride_xm, stride_xn)
                dy = _tile(dy_ptr, offs_m, n + lanes, M, N, stride_dym, stride_dyn)
                squares += x * x
                along += dy * _vector(w_ptr, n + lanes, N) * x
            r = tl.rsqrt(_mean(squares, N) + eps)
            share = _mean(along, N) * r
            for n in range(0, N, BLOCK_N):
                offs_n = n + lanes
                x = _tile(x_ptr, offs_m, offs_n, M, N, stride_xm, stride_xn) * r
                dy = _tile(dy_ptr, offs_m, offs_n, M, N, stride_dym, stride_dyn)
                dx = r * (dy * _vector(w_ptr, offs_n, N) - x * share)
                _store(dx_ptr, dx, offs_m, offs_n, M, N)
                if part_ptr is not None:
                    part_ptrs = part_ptr + pid * N + offs_n
                    part = tl.load(part_ptrs, mask=(offs_n < N) & (start > 0), other=0.0)
                    part += tl.sum(tl.where((offs_m < M)[:, None], dy * x, 0.0), 0)
                    tl.store(part_ptrs, part, mask=offs_n < N)
    if HELD and part_ptr is not None:
        tl.store(part_ptr + pid * N + lanes, dw, mask=lanes < N)


def forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y [M, N] in x's dtype for x [M, N]."""
    M, N = x.shape
    y = x.new_empty(M, N)
    if M:
        tiles = _tiles(N, HELD_FORWARD)
        _forward[(cdiv(M, tiles.block_m),)](
            x, weight.contiguous(), y,
            M, N,
            *x.stride(),
            eps,
            tiles.held, tiles.block_m, tiles.block_n,
            num_warps=tiles.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, needs_weight: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx [M, N] in x's dtype and, where it is asked for, dw [N] in weight's."""
    M, N = x.shape
    dx = x.new_empty(M, N)
    if not M:
        return dx, weight.new_zeros(N) if needs_weight else None
    tiles = _tiles(N, HELD_BACKWARD)
    rows, parts = tiles.block_m, None
    if needs_weight:
        rows *= cdiv(M, PARTS * rows)
        parts = x.new_empty(cdiv(M, rows), 1, N, dtype=torch.float32)
    _backward[(cdiv(M, rows),)](
        dy, x, weight.contiguous(), dx, parts,
        M, N, rows,
        *dy.stride(), *x.stride(),
        eps,
        tiles.held, tiles.block_m, tiles.block_n,
        num_warps=tiles.warps, enable_fp_fusion=True,
    )  # fmt: skip
    if parts is None:
        return dx, None
    dweight = weight.new_empty(N)
    sum_parts(parts, dweight[None])
    return dx, dweight


class _Tiles(NamedTuple):
    held: bool
    block_m: int
    block_n: int
    warps: int


@functools.lru_cache
def _tiles(n: int, held: int) -> _Tiles:
    """Several short rows or one, whole up to `held` columns."""
    columns = max(next_power_of_2(n), 16)
    block_n = columns if columns <= held else BLOCK
    block_m = max(1024 // block_n, 1)
    warps = min(block_m * block_n // 512, 16)
    return _Tiles(columns <= held, block_m, block_n, warps)
