"""Pieces of kernels that every operation uses: activations, the dropout mask, tile order.

All are `@triton.jit` functions on tiles in registers; the maths of each activation and the mask's
definition are those of `core.activations` and `core.rng`, which the tests compare them with.
"""

import triton
import triton.language as tl

INV_SQRT_2 = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
# gelu_tanh(z) = z · (1 + tanh u) / 2 = z · sigmoid(2u), 2u = TANH_A · (z + TANH_B · z³)
TANH_A = tl.constexpr(1.5957691216057308)  # 2 · sqrt(2 / pi)
TANH_B = tl.constexpr(0.044715)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """`act(z)` in z's dtype (float32); nan stays nan."""
    if ACTIVATION == "relu":
        return tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.math.erf(z * INV_SQRT_2))
    elif ACTIVATION == "gelu_tanh":
        return z * tl.sigmoid(z * (1.0 + z * z * TANH_B) * TANH_A)
    elif ACTIVATION == "silu":
        return z * tl.sigmoid(z)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return z


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    """`act'(z)` in z's dtype (float32); relu'(0) is 0."""
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        density = tl.exp(-0.5 * z * z) * INV_SQRT_2PI
        return 0.5 * (1.0 + tl.math.erf(z * INV_SQRT_2)) + z * density
    elif ACTIVATION == "gelu_tanh":
        twice_u = z * (1.0 + z * z * TANH_B) * TANH_A
        gate = tl.sigmoid(twice_u)
        rest = tl.sigmoid(-twice_u)  # 1 - gate, without the cancellation where the gate is open
        return gate + z * gate * rest * (1.0 + z * z * (3.0 * TANH_B)) * TANH_A
    elif ACTIVATION == "silu":
        gate = tl.sigmoid(z)
        return gate * (1.0 + z * (1.0 - gate))
    else:
        tl.static_assert(ACTIVATION == "identity")
        return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def _mix(h):
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _draw(pair, k0, k1):
    """Two 16-bit lanes for each counter: uint32 of the counters' shape."""
    h = pair ^ k0
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = ((h ^ (h >> 15)) + k1) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _own_columns(offs_n, widths):
    """Columns of tensors side by side as columns of their own tensor, and how wide that is."""
    start = 0
    own = offs_n
    width = tl.zeros(offs_n.shape, tl.int32) + widths[0]
    for i in tl.static_range(1, len(widths)):
        start += widths[i - 1]
        own = tl.where(offs_n >= start, offs_n - start, own)
        width = tl.where(offs_n >= start, widths[i], width)
    return own, width


@triton.jit
def keep_mask(
    seed_ptr, offs_m, start_n, N, threshold,
    PAIRED: tl.constexpr, BLOCK_N: tl.constexpr, widths=None,
):  # fmt: skip
    """Which elements of an [M, N] tensor dropout keeps: bool [BLOCK_M, BLOCK_N].

    Rows are `offs_m`, columns `start_n + [0, BLOCK_N)` with start_n even. PAIRED promises an even
    N and at most 2**33 elements: then a counter fits 32 bits, the keys are scalars, and one hash
    serves two neighbours.

    `widths`: a tuple that sums to N, where tensors [M, width] stand side by side and each has the
    mask it would have alone; PAIRED then promises the same of every width.
    """
    seed = tl.load(seed_ptr)
    seed_hi = (seed >> 32).to(tl.uint32)
    seed_lo = seed.to(tl.uint32) + _mix(seed_hi)
    if PAIRED:
        k0 = _mix(seed_lo + 0x9E3779B9)
        k1 = _mix(seed_hi ^ k0 ^ 0x85EBCA6B)
        offs_pair = start_n // 2 + tl.arange(0, BLOCK_N // 2)
        if widths is None:
            row_pairs = tl.cast(N // 2, tl.uint32)
        else:
            offs_n, width = _own_columns(2 * offs_pair, widths)
            offs_pair, row_pairs = offs_n // 2, (width // 2).to(tl.uint32)[None, :]
        pair = offs_m.to(tl.uint32)[:, None] * row_pairs + offs_pair.to(tl.uint32)[None, :]
        h = _draw(pair, k0, k1)
        lane = tl.interleave(h & 0xFFFF, h >> 16)
    else:
        offs_n = start_n + tl.arange(0, BLOCK_N)
        if widths is None:
            row = offs_m.to(tl.int64)[:, None] * N
        else:
            offs_n, width = _own_columns(offs_n, widths)
            row = offs_m.to(tl.int64)[:, None] * width[None, :]
        index = row + offs_n[None, :]
        pair = index >> 1
        k0 = _mix(seed_lo + 0x9E3779B9 * ((pair >> 32).to(tl.uint32) + 1))
        k1 = _mix(seed_hi ^ k0 ^ 0x85EBCA6B)
        h = _draw(pair.to(tl.uint32), k0, k1)
        lane = (h >> ((index & 1) * 16).to(tl.uint32)) & 0xFFFF
    return lane >= tl.cast(threshold, tl.uint32)


@triton.jit
def effective_scale(scale, scale_ptr):
    """`scale · *scale_ptr` (1 if the pointer is None) in float32.

    The cast matters: a float argument is float32 in an eager launch and float64 in one made by
    Inductor.
    """
    alpha = tl.cast(scale, tl.float32)
    if scale_ptr is not None:
        alpha *= tl.load(scale_ptr).to(tl.float32)
    return alpha


@triton.jit
def grouped_tile(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile (m, n) of a program: GROUP_M tile rows at a time, so that both operands stay in L2."""
    group_size = GROUP_M * tiles_n
    first_m = pid // group_size * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    return first_m + pid % group_size % rows, pid % group_size // rows
