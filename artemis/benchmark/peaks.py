"""What the machine can do: rate of matrix products and of copies, measured in the run itself."""

from collections.abc import Callable

import torch

from .timer import Timer

Seconds = Callable[[Callable[[], object]], float]

_PRODUCT = (1024, 2048, 2048)  # large enough for the full rate, small enough to repeat
_GPU_PRODUCT = (8192, 8192, 8192)
_COPY_BYTES = 1 << 28  # far past the last-level cache
_GPU_COPY_BYTES = 1 << 30


def peaks() -> dict[str, float]:
    """Of the GPU, where there is one, else of the CPU, the best of several calls.

    GFLOP/s of fp32 and bf16 products, GB/s of a copy (read and write counted).
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = Timer(device, rounds=7, flush=False).best
    return {
        "gemm_fp32_gflops": round(gemm(torch.float32, device, seconds), 1),
        "gemm_bf16_gflops": round(gemm(torch.bfloat16, device, seconds), 1),
        "copy_gbs": round(copy(device, seconds), 1),
    }


def gemm(dtype: torch.dtype, device: torch.device, seconds: Seconds) -> float:
    """GFLOP/s of `x Wᵀ`, x [m, k] and W [n, k], timed by `seconds`."""
    m, k, n = _GPU_PRODUCT if device.type == "cuda" else _PRODUCT
    x, weight = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
    return 2 * m * k * n / seconds(lambda: torch.nn.functional.linear(x, weight)) / 1e9


def copy(device: torch.device, seconds: Seconds) -> float:
    """GB/s of a large copy, read and write counted, timed by `seconds`."""
    size = _GPU_COPY_BYTES if device.type == "cuda" else _COPY_BYTES
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source)) / 1e9
