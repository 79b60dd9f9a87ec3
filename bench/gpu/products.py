"""The GEMM with its low-rank epilogue, by pointers, by descriptors, and by the vendor's GEMM.

What decides two defaults of `artemis_kernels.core.tuning`: whether products go by descriptors, and
how far Triton's are taken to lack behind the vendor's. Forward `x Wᵀ` and dX `dY W` each.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.nn import functional

from artemis.benchmark.operations import relative_error
from artemis.benchmark.timer import Timer
from artemis_kernels.core import device as devices
from artemis_kernels.core import tuning
from artemis_kernels.core.tiling import Shape
from artemis_kernels.ops.low_rank.expand import expand
from artemis_kernels.ops.low_rank.expand_persistent import expand_persistent, has_descriptors
from artemis_kernels.ops.low_rank.steps import updated

from .failures import FAILURES, Row, failure, of_each, tried


class Product(NamedTuple):
    """y [m, n] = x [m, k] Wᵀ + S Bᵀ, S [m, r]; `back`: W lies transposed, as in dX = dY W."""

    m: int
    k: int
    n: int
    r: int
    back: bool


def workloads(tiny: bool) -> Iterator[Product]:
    """Layers of Llama 2 7B, Llama 3 8B and 70B at the rows of training steps."""
    if tiny:
        yield from (Product(40, 32, 48, 8, back) for back in (False, True))
        return
    for m, k, n, r in (
        (8192, 4096, 4096, 16),
        (8192, 4096, 1024, 16),
        (8192, 4096, 11008, 64),
        (8192, 2048, 2048, 16),
        (1024, 4096, 4096, 16),
        (2048, 4096, 4096, 16),
        (2048, 4096, 11008, 64),
        (1024, 4096, 11008, 64),
        (8192, 8192, 8192, 16),
    ):
        yield from (Product(m, k, n, r, back) for back in (False, True))


def products(device: torch.device, tiny: bool, rounds: int) -> Iterator[Row]:
    """A row for every product and way; `over_pointers` compares with the kernel by pointers."""
    dtype = torch.float32 if tiny else torch.bfloat16
    timer = Timer(device, rounds)
    yield from of_each(
        "product", workloads(tiny), lambda work: _measured(work, dtype, device, timer)
    )


def _measured(
    work: Product, dtype: torch.dtype, device: torch.device, timer: Timer
) -> Iterator[Row]:
    torch.manual_seed(0)
    m, k, n, r, back = work
    with torch.device(device):
        x, weight = torch.randn(m, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)
        s, b = torch.randn(m, r), torch.randn(n, r) / r**0.5
    weight = weight.t().contiguous().t() if back else weight
    ways = _ways(x, weight, s, b, devices.chip(device))
    rows = _checked(ways, x, weight, s, b)
    calls = {name: way for name, way in ways.items() if rows[name]["passed"]}
    for name, times in timer.rows(tried(calls, rows)).items():
        rows[name] |= times
    for name, row in rows.items():
        if "ms" in row:
            row["tflops"] = 2 * m * n * (k + r * (name != "bare")) / row["ms"]["p50"] / 1e9
            if "ms" in rows["pointers"]:
                row["over_pointers"] = row["ms"]["p50"] / rows["pointers"]["ms"]["p50"]
        yield {"provider": name if name == "bare" else f"artemis, {name}"} | row


def _ways(x, weight, s, b, chip) -> dict[str, Callable[[], torch.Tensor]]:
    (m, k), (n, r) = x.shape, b.shape
    config = tuning.config("expand", Shape(m, n, k, r, x.dtype), chip)
    ways = {
        "pointers": lambda: expand(x, weight, s, b, config=config),
        "vendor, then update": lambda: _vendor(x, weight, s, b, chip),
        "bare": lambda: functional.linear(x, weight),
    }
    if has_descriptors(x, weight):
        ways["descriptors"] = lambda: expand_persistent(
            x, weight, s, b, config=config, programs=chip.processors
        )
    return ways


def _vendor(x, weight, s, b, chip) -> torch.Tensor:
    y = functional.linear(x, weight)
    return updated(y, s, b, chip, dtype=y.dtype, out=y)


def _checked(ways: dict[str, Callable], x, weight, s, b) -> dict[str, Row]:
    """Error of each way against fp64; limit: half as much again as plain torch's."""
    exact = x.double() @ weight.double().t() + s.double() @ b.double().t()
    plain = functional.linear(x, weight) + functional.linear(s.to(x.dtype), b.to(x.dtype))
    limit = 1.5 * relative_error(plain, exact) + torch.finfo(x.dtype).eps / 4
    rows: dict[str, Row] = {"bare": {"passed": True}}
    for name, way in ways.items():
        if name == "bare":
            continue
        try:
            error = relative_error(way(), exact)
            rows[name] = {"passed": error <= limit, "error": error}
        except FAILURES as broken:
            rows[name] = failure(broken)
    return rows
