"""Weight gradients of a bottleneck on x: dD and dU in one launch, then one sum of their parts.

    dD = s·dzᵀ x      dU = s·dYᵀ h      db_d = s·Σ dz      db_u = s·Σ dY
    ds = Σ (dYᵀ h) ⊙ U + Σ dY·b_u

| name   | shape  | dtype                                  | strides    |
| x, dy  | [M, K] | fp16, bf16, fp32; the same             | any        |
| dz, h  | [M, R] | any float, cast to x's                 | contiguous |
| parts  | [P, S] | fp32: dD [R, K], dU [K, R], and where biases are asked for Σ dz [R], Σ dY [K] |
| ddown, dup, dbias_down, dbias_up | of D, U, b_d, b_u | any float | contiguous |

Half of the programs sum over dzᵀ x, half over dYᵀ h: they share no operand, so that one program for
both would only halve its tile. `sum_gradients` adds the P parts in a fixed order, whatever the
scheduling.

4·M·K·R FLOPs; bytes: x and dy once for each BLOCK_R columns of the hidden matrices, dz and h once
for each BLOCK_K columns of x (from the cache), 8·P·K·R written and read. h is read and not drawn
again from z: in 16 bits it is half of z's bytes, and is read K / BLOCK_K times.
"""

import torch
import triton
import triton.language as tl

from ...core.tiles import effective_scale
from ...core.tiling import Config, cdiv
from ..low_rank.arguments import UNSCALED, Scale, contiguous, strides
from ..low_rank.over_rows import over_rows

_BLOCK_P = 16
_BLOCK = 128


@triton.jit(do_not_specialize=["M"])
def _weight_gradients(
    x_ptr, dy_ptr, dz_ptr, h_ptr, part_ptr,
    M, K, R, S,
    stride_xm, stride_xk, stride_dym, stride_dyk,
    WITH_SUMS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid_k, of_up = tl.program_id(0) % tiles_k, tl.program_id(0) // tiles_k
    start_k, pid_r, part = pid_k * BLOCK_K, tl.program_id(1), tl.program_id(2)

    offs_k = start_k + tl.arange(0, BLOCK_K).to(tl.int64)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    mask_k, mask_r = offs_k < K, offs_r < R
    mask = mask_k[:, None] & mask_r[None, :]
    size = tl.cast(K, tl.int64) * R
    part_ptr += part.to(tl.int64) * S
    if of_up == 0:
        ddown, dz_sums = over_rows(
            x_ptr, dz_ptr, None, start_k, offs_r, part, M, K, R, stride_xm, stride_xk, R, 0,
            "s" if WITH_SUMS else "", PARTS, False, BLOCK_M, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        tl.store(part_ptr + offs_r[None, :] * K + offs_k[:, None], ddown, mask=mask)
        if WITH_SUMS:
            tl.store(part_ptr + 2 * size + offs_r, dz_sums, mask=mask_r & (pid_k == 0))
    else:
        dup, dy_sums = over_rows(
            dy_ptr, h_ptr, None, start_k, offs_r, part, M, K, R, stride_dym, stride_dyk, R, 0,
            "x" if WITH_SUMS else "", PARTS, False, BLOCK_M, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        tl.store(part_ptr + size + offs_k[:, None] * R + offs_r[None, :], dup, mask=mask)
        if WITH_SUMS:
            tl.store(part_ptr + 2 * size + R + offs_k, dy_sums, mask=mask_k & (pid_r == 0))


@triton.jit(do_not_specialize=["P"])
def _sum_gradients(
    part_ptr, ddown_ptr, dup_ptr, dbias_down_ptr, dbias_up_ptr, up_ptr, bias_up_ptr, dots_ptr,
    scale_ptr,
    P, K, R, S,
    stride_uk, stride_ur,
    scale,
    BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)

    offs = pid * BLOCK + tl.arange(0, BLOCK)
    offs_p = tl.arange(0, BLOCK_P)
    part_ptrs = part_ptr + offs_p.to(tl.int64)[:, None] * S + offs[None, :]

    acc = tl.zeros([BLOCK], tl.float32)
    for p in range(0, P, BLOCK_P):
        part = tl.load(part_ptrs, mask=(p + offs_p < P)[:, None] & (offs < S)[None, :], other=0.0)
        acc += tl.sum(part, 0)
        part_ptrs += tl.cast(S, tl.int64) * BLOCK_P

    # Where each of the four begins; a block may hold the end of one and the start of the next.
    size = tl.cast(K, tl.int64) * R
    of_up, of_bias_down = offs - size, offs - 2 * size
    of_bias_up = of_bias_down - R
    mask_up, mask_bias_up = (of_up >= 0) & (of_up < size), (of_bias_up >= 0) & (of_bias_up < K)
    out = acc * effective_scale(scale, scale_ptr)
    tl.store(ddown_ptr + offs, out, mask=offs < size)
    if dup_ptr is not None:
        tl.store(dup_ptr + of_up, out, mask=mask_up)
    if dbias_down_ptr is not None:
        tl.store(
            dbias_down_ptr + of_bias_down, out, mask=(of_bias_down >= 0) & (of_bias_down < R)
        )  # fmt: skip
    if dbias_up_ptr is not None:
        tl.store(dbias_up_ptr + of_bias_up, out, mask=mask_bias_up)
    if dots_ptr is not None:
        up_ptrs = up_ptr + of_up // R * stride_uk + of_up % R * stride_ur
        other = tl.load(up_ptrs, mask=mask_up, other=0.0).to(tl.float32)
        if bias_up_ptr is not None:
            bias = tl.load(bias_up_ptr + of_bias_up, mask=mask_bias_up, other=0.0)
            other += bias.to(tl.float32)
        tl.store(dots_ptr + pid, tl.sum(acc * other))


def weight_gradients(
    x: torch.Tensor,
    dy: torch.Tensor,
    dz: torch.Tensor,
    h: torch.Tensor,
    *,
    config: Config,
    with_sums: bool = False,
) -> torch.Tensor:
    """Return the parts [P, S], unscaled; `with_sums`: with those of Σ dz and Σ dY."""
    (M, K), R = x.shape, dz.shape[1]
    P, S = config.split if M else 0, 2 * K * R + (K + R if with_sums else 0)
    parts = x.new_empty(P, S, dtype=torch.float32)
    if M == 0:
        return parts
    _weight_gradients[(2 * cdiv(K, config.block_k), cdiv(R, config.block_r), P)](
        x, dy, dz, h, parts,
        M, K, R, S,
        *x.stride(), *dy.stride(),
        with_sums, P, config.block_m, config.block_k, config.block_r,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return parts


def sum_gradients(
    parts: torch.Tensor,
    ddown: torch.Tensor,
    dup: torch.Tensor | None,
    dbias_down: torch.Tensor | None = None,
    dbias_up: torch.Tensor | None = None,
    *,
    scale: Scale = UNSCALED,
    against: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> torch.Tensor | None:
    """Write `s·Σ parts` into the gradients that are given.

    `against` is (U, b_u or None): return the gradient of s without its float part, 0-d fp32.
    """
    (P, S), (R, K) = parts.shape, ddown.shape
    blocks = cdiv(S, _BLOCK)
    up, bias_up = against or (None, None)
    dots = None if against is None else parts.new_empty(blocks)
    _sum_gradients[(blocks,)](
        parts, ddown, dup, dbias_down, dbias_up, up, contiguous(bias_up), dots, scale.tensor,
        P, K, R, S,
        *strides(up),
        scale.number,
        _BLOCK_P, _BLOCK,
        num_warps=4, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    return None if dots is None else dots.sum()
