"""The dropout mask by its written definition (docs/dropout.md), in Python's own integers.

Written from the definition, one element at a time, sharing nothing with the library: what the
torch, C and Triton forms are held to.
"""

_MASK32 = 0xFFFFFFFF


def mix(h: int) -> int:
    """A bijection on 32-bit words."""
    h ^= h >> 16
    h = h * 0x7FEB352D & _MASK32
    h ^= h >> 15
    h = h * 0x846CA68B & _MASK32
    return h ^ h >> 16


def lane(index: int, seed: int) -> int:
    """The 16-bit number that decides over element `index` (row-major) under `seed` (int64)."""
    pair = index >> 1
    low, high = seed & _MASK32, seed >> 32 & _MASK32
    k0 = mix(low + mix(high) + 0x9E3779B9 * ((pair >> 32) + 1) & _MASK32)
    k1 = mix(high ^ k0 ^ 0x85EBCA6B)
    h = pair & _MASK32 ^ k0
    h ^= h >> 16
    h = h * 0x7FEB352D & _MASK32
    h ^= h >> 15
    h = h + k1 & _MASK32
    h = h * 0x846CA68B & _MASK32
    h ^= h >> 16
    return h >> 16 * (index & 1) & 0xFFFF


def kept(index: int, p: float, seed: int) -> bool:
    """Whether dropout keeps element `index`."""
    return lane(index, seed) >= min(round(p * 65536), 65535)
