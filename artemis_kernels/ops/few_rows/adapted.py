"""An adapted layer at one to four rows: the shrink, then the base with the low-rank term."""

from collections.abc import Callable

import torch

from ...core import device, tuning
from ...core.frozen import FrozenAdapter
from ...core.quantized import QuantizedWeight
from ...core.tiling import Shape
from ...core.types import Scale as Given
from ..low_rank.arguments import Scale
from ..packed.epilogue import Epilogue
from . import matvec, shrink


def prepared(
    weight: torch.Tensor | QuantizedWeight, adapter: FrozenAdapter, rows: int
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A function of x [rows, in] -> y [rows, out]: two launches whose arguments are made once.

    They read the tensors that there are now. None where an x of so many rows takes other kernels.
    """
    (N, K), R, chip = weight.shape, adapter.rank, device.chip(adapter.down.device)
    shape = Shape(rows, N, K, R, adapter.dtype)
    along_k = isinstance(weight, QuantizedWeight) or weight.stride(1) == 1
    if not R or adapter.reads_output or not along_k or adapter.down.stride(1) != 1:
        return None
    if not tuning.walks_rows(shape):
        return None
    linear = adapter.is_linear
    reduce = shrink.prepared(
        adapter.down, rows,
        tuning.config("matvec_shrink", Shape(rows, k=K, r=R, dtype=adapter.dtype), chip),
        "linear" if linear else "forward", adapter.bias_down, adapter.activation, not linear,
    )  # fmt: skip
    kernel = f"matvec_{weight.format if isinstance(weight, QuantizedWeight) else 'tensor'}"
    expand = matvec.prepared(
        weight,
        Epilogue(b=adapter.up, bias=adapter.bias, scale=Scale(*Given.of(adapter.scale))),
        rows,
        tuning.config(kernel, shape, chip),
    )

    def launch(x: torch.Tensor) -> torch.Tensor:
        with torch.cuda.device_of(x):  # where Triton launches
            z, h = reduce(x)
            return expand(x, z if linear else h)

    return launch
