"""What packed weights should gain on an H200, reckoned before any GPU ran them.

A product takes the longer of its bytes and its operations, each at the share of the peak that such
kernels reach elsewhere. Peaks: NVIDIA's data sheet of H200 SXM (dense). Shares: copies reach 90 %
of the bandwidth; kernels that unpack 8 bits on the way 85 %, 4 bits 72 %; GEMMs at sustained clocks
73 % of the 16-bit and 61 % of the 8-bit peak, a dequantizing loop half of that of a 16-bit one.
"""

from typing import Any

BANDWIDTH, RATE_16, RATE_8 = 4.8e12, 989e12, 1979e12
RANK, LAUNCH = 16, 3e-6  # seconds between two kernels of one graph
_SHARE = {"16-bit": 0.90, "int8": 0.85, "fp8": 0.85, "int4": 0.72}
_BYTES = {"16-bit": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5 + 4 / 128}
LAYERS = ((4096, 4096, 4), (4096, 11008, 2), (11008, 4096, 1))  # of a Llama 2 7B block
ROWS = (1, 16, 64, 240, 512, 2048, 8192)


def product(rows: int, k: int, n: int, format: str, adapters: bool) -> float:
    """Seconds of `x Wᵀ` (with LoRA's term) in the way `core.packed_choice` takes on sm_90."""
    operations = 2 * rows * k * n
    weight, ends = _BYTES[format] * k * n, 2 * rows * (k + n)
    share = _SHARE[format]
    if format == "16-bit":
        seconds = max(operations / (0.73 * RATE_16), (weight + ends) / (share * BANDWIDTH))
    elif rows <= 64 or (format == "int4" and rows <= 240):
        rate = 0.73 * RATE_16 * (1 if rows <= 64 else 0.5)
        seconds = max(operations / rate, (weight + ends) / (share * BANDWIDTH))
    elif format == "int4":  # a dense copy first
        seconds = (weight + 2 * k * n) / (0.9 * BANDWIDTH) + operations / (0.73 * RATE_16)
    else:  # rows rounded: x read (twice where columns are kept apart), q written and read
        rounding = rows * k * (3 + 2 * (format == "int8")) / (0.9 * BANDWIDTH) + LAUNCH
        seconds = operations / (0.61 * RATE_8) + rounding
    if adapters:
        seconds += LAUNCH + (2 * rows * k + 4 * RANK * (k + n)) / (0.9 * BANDWIDTH)
    return seconds


def block(rows: int, format: str, adapters: bool) -> float:
    """Seconds of all products of a block, forward."""
    return sum(count * product(rows, k, n, format, adapters) for k, n, count in LAYERS)


def table(records: list[dict[str, Any]]) -> str:
    """Speed of a block's products with LoRA over a packed base, of the bare 16-bit ones."""
    formats = tuple(_BYTES)
    lines = [
        "| rows | " + " | ".join(f"{f}, LoRA" for f in formats) + " |",
        "| ---: |" + " ---: |" * len(formats),
    ]
    for rows in ROWS:
        bare = block(rows, "16-bit", adapters=False)
        ratios = (bare / block(rows, format, adapters=True) for format in formats)
        lines.append(f"| {rows:,} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return "\n".join(lines) + "\n"
