"""What the machine can do: rate of matrix products and of copies, measured in the run itself."""

import torch

from .runner import best

_PRODUCT = (1024, 2048, 2048)  # large enough for the full rate, small enough to repeat
_COPY_BYTES = 1 << 28  # far past the last-level cache


def peaks() -> dict[str, float]:
    """GFLOP/s of fp32 and bf16 products, GB/s of a copy (read and write counted): the best of
    several calls."""
    return {
        "gemm_fp32_gflops": _gemm(torch.float32),
        "gemm_bf16_gflops": _gemm(torch.bfloat16),
        "copy_gbs": _copy(),
    }


def _gemm(dtype: torch.dtype) -> float:
    m, k, n = _PRODUCT
    x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    return 2 * m * k * n / best(lambda: torch.nn.functional.linear(x, weight)) / 1e9


def _copy() -> float:
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / best(lambda: target.copy_(source)) / 1e9
