"""What the machine can do: rate of matrix products and of copies, measured in the run itself."""

from collections.abc import Callable

import torch

from .runner import best

_PRODUCT = (1024, 2048, 2048)  # large enough for the full rate, small enough to repeat
_GPU_PRODUCT = (8192, 8192, 8192)
_COPY_BYTES = 1 << 28  # far past the last-level cache
_GPU_COPY_BYTES = 1 << 30


def peaks() -> dict[str, float]:
    """GFLOP/s of fp32 and bf16 products, GB/s of a copy (read and write counted): the best of
    several calls."""
    return {
        "gemm_fp32_gflops": gemm(torch.float32),
        "gemm_bf16_gflops": gemm(torch.bfloat16),
        "copy_gbs": copy(),
    }


def gpu_peaks(
    device: torch.device, dtype: torch.dtype, seconds: Callable[[Callable[[], object]], float]
) -> tuple[float, float]:
    """FLOP/s of a product in `dtype` and bytes/s of a copy on `device`, timed by `seconds`."""
    large = device.type == "cuda"
    rate = gemm(dtype, device, seconds, _GPU_PRODUCT if large else _PRODUCT)
    return rate * 1e9, copy(device, seconds, _GPU_COPY_BYTES if large else _COPY_BYTES) * 1e9


def gemm(dtype: torch.dtype, device="cpu", seconds=best, sizes=_PRODUCT) -> float:
    """GFLOP/s of `x Wᵀ`, x [m, k] and W [n, k]."""
    m, k, n = sizes
    x, weight = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
    return 2 * m * k * n / seconds(lambda: torch.nn.functional.linear(x, weight)) / 1e9


def copy(device="cpu", seconds=best, size=_COPY_BYTES) -> float:
    """GB/s of a copy of `size` bytes, read and write counted."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source)) / 1e9
