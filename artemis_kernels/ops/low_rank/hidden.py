"""Between the two products: what happens to a tile of the hidden [M, R] matrix.

Three stages, chosen at compile time:

    linear    out = acc                      LoRA: nothing but the rescaling of a dropout on x
    forward   out = z = acc + bias           h = dropout(act(z))
    backward  out = dz = acc·mask·act'(z)    acc is dh, z was saved; h again where it is asked for

Everything is float32 until a store; `out` is float32, `h` has the dtype of its buffer. `out` is
scaled where a scale is given: a group's gradients stand side by side, each under its own.
"""

import triton
import triton.language as tl

from ...core.tiles import activate, activation_slope, effective_scale, keep_mask


@triton.jit
def hidden_units(
    z, offs_m, start_r, R, seed_ptr, threshold, rescale,
    ACTIVATION: tl.constexpr, PAIRED: tl.constexpr, BLOCK_R: tl.constexpr, widths=None,
):  # fmt: skip
    """`h = dropout(act(z))`, float32 [BLOCK_M, BLOCK_R]; `widths` as `keep_mask` takes them."""
    h = activate(z, ACTIVATION)
    if seed_ptr is not None:
        keep = keep_mask(seed_ptr, offs_m, start_r, R, threshold, PAIRED, BLOCK_R, widths)
        h = tl.where(keep, h * tl.cast(rescale, tl.float32), 0.0)
    return h


@triton.jit
def hidden_gradient(
    dh, z, offs_m, start_r, R, seed_ptr, threshold, rescale,
    ACTIVATION: tl.constexpr, PAIRED: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`dz = dh · mask/keep · act'(z)`, float32 [BLOCK_M, BLOCK_R]."""
    dz = dh * activation_slope(z, ACTIVATION)
    if seed_ptr is not None:
        keep = keep_mask(seed_ptr, offs_m, start_r, R, threshold, PAIRED, BLOCK_R)
        dz = tl.where(keep, dz * tl.cast(rescale, tl.float32), 0.0)
    return dz


@triton.jit
def finish_hidden(
    acc, bias_ptr, z_ptr, out_ptr, h_ptr, seed_ptr, offs_m, start_r, M, R, stride_zm, stride_outm,
    threshold, rescale,
    STAGE: tl.constexpr, ACTIVATION: tl.constexpr, PAIRED: tl.constexpr, BLOCK_R: tl.constexpr,
    widths=None, scale=None, scale_ptr=None,
):  # fmt: skip
    """Take a complete float32 sum through its stage, store `out` and `h`, return their tiles.

    Rows of z and `out` may lie in a wider matrix; h is contiguous. A pointer that is None is not
    touched; `h` is meaningless in the linear stage. `widths`: those of bottlenecks side by side,
    whose masks are drawn in the forward stage.
    """
    offs_r = start_r + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    mask = (offs_m < M)[:, None] & mask_r[None, :]

    out = acc
    h = acc
    if STAGE == "linear":
        if seed_ptr is not None:
            out = acc * tl.cast(rescale, tl.float32)
    elif STAGE == "forward":
        if bias_ptr is not None:
            out += tl.load(bias_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
        h = hidden_units(
            out, offs_m, start_r, R, seed_ptr, threshold, rescale, ACTIVATION, PAIRED, BLOCK_R,
            widths,
        )  # fmt: skip
    else:
        tl.static_assert(STAGE == "backward")
        z_ptrs = z_ptr + offs_m[:, None] * stride_zm + offs_r[None, :]
        z = tl.load(z_ptrs, mask=mask, other=0.0)
        out = hidden_gradient(
            acc, z, offs_m, start_r, R, seed_ptr, threshold, rescale, ACTIVATION, PAIRED, BLOCK_R
        )
        if h_ptr is not None:
            h = hidden_units(
                z, offs_m, start_r, R, seed_ptr, threshold, rescale, ACTIVATION, PAIRED, BLOCK_R
            )

    if scale is not None:
        out *= effective_scale(scale, scale_ptr)
    tl.store(out_ptr + offs_m[:, None] * stride_outm + offs_r[None, :], out, mask=mask)
    if h_ptr is not None:
        h_ptrs = h_ptr + offs_m[:, None] * R + offs_r[None, :]
        tl.store(h_ptrs, h.to(h_ptr.dtype.element_ty), mask=mask)
    return out, h
