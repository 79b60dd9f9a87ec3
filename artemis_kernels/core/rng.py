"""The dropout mask: a counter-based hash, the same bits on GPU, CPU and interpreter.

Element `i` (row-major, int64) of a tensor is dropped if lane `i & 1` of `hash(seed, i >> 1)`, a
16-bit number, lies below `threshold(p)`. The hash is stated in docs/dropout.md; its Triton form
is `core/tiles.py`, its C form `core/native/mask.h`; all are compared with this file.
"""

import torch

LANES = 1 << 16
_PAIRS_PER_KEY = 1 << 32


def threshold(p: float) -> int:
    """Number of the 65,536 lane values that drop: `round(p · 65536)`, always leaving one kept."""
    return min(round(p * LANES), LANES - 1)


def keep_scale(p: float) -> float:
    """Factor for kept values: 1 over the *effective* keep rate."""
    return LANES / (LANES - threshold(p))


def new_seed(device: torch.device) -> torch.Tensor:
    """Draw a seed on `device` from torch's generator: one int64 element, never read back."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def dropout_mask(
    shape: tuple[int, ...], p: float, seed: int | torch.Tensor, device: torch.device | str
) -> torch.Tensor:
    """The mask every path draws for a tensor of `shape`: bool, True = kept."""
    if not isinstance(seed, torch.Tensor):
        seed = torch.tensor([seed], dtype=torch.int64, device=device)
    count = torch.Size(shape).numel()
    pairs = (count + 1) // 2
    kept = []
    for high in range(-(-pairs // _PAIRS_PER_KEY)):
        size = min(_PAIRS_PER_KEY, pairs - high * _PAIRS_PER_KEY)
        h = _hash(size, high, seed.reshape(()))
        lanes = torch.stack((h & 0xFFFF, (h >> 16) & 0xFFFF), dim=-1)
        kept.append((lanes >= threshold(p)).reshape(-1))
    if not kept:
        return torch.empty(shape, dtype=torch.bool, device=device)
    return (kept[0] if len(kept) == 1 else torch.cat(kept))[:count].reshape(shape)


def _hash(pairs: int, high: int, seed: torch.Tensor) -> torch.Tensor:
    """One 32-bit hash for each of `pairs` counters whose high half is `high`."""
    low_seed, high_seed = _int32(seed), _int32(seed >> 32)
    k0 = _mix(low_seed + _mix(high_seed) + _signed(0x9E3779B9 * (high + 1)))
    k1 = _mix(high_seed ^ k0 ^ _signed(0x85EBCA6B))
    h = _int32(torch.arange(pairs, dtype=torch.int64, device=seed.device))
    h = h ^ k0  # no in-place operation: under vmap k0 is a batch, and h is not yet
    h.bitwise_xor_(_shift(h, 16)).mul_(_signed(0x7FEB352D))
    h.bitwise_xor_(_shift(h, 15)).add_(k1).mul_(_signed(0x846CA68B))
    return h.bitwise_xor_(_shift(h, 16))


def _mix(h: torch.Tensor) -> torch.Tensor:
    h = (h ^ _shift(h, 16)) * _signed(0x7FEB352D)
    h = (h ^ _shift(h, 15)) * _signed(0x846CA68B)
    return h ^ _shift(h, 16)


def _shift(h: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int32 (torch shifts arithmetically)."""
    return (h >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _signed(value: int) -> int:
    """The int32 that has the bits of `value` mod 2**32."""
    return (value + 2**31) % 2**32 - 2**31


def _int32(x: torch.Tensor) -> torch.Tensor:
    """Low 32 bits of an int64 tensor, as int32."""
    return ((x + 2**31) % 2**32 - 2**31).to(torch.int32)
