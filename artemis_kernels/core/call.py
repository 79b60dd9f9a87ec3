"""What every public function does with its arguments before an operator sees them."""

import contextlib
from typing import NamedTuple

import torch

from . import rng
from .device import has_autocast, why_no_triton
from .quantized import QuantizedWeight
from .registration import DEVICES
from .types import Unavailable

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: What an exported program of any number of rows is made for: its one path fits many best.
ROWS_OF_AN_EXPORT = 1024


class Path(NamedTuple):
    """Implementation and strategy a call takes, and why, in one sentence without a full stop."""

    impl: str
    strategy: str
    reason: str


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype an operation computes in: x's, or autocast's where autocast reaches x."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast reaches x: operands of any dtype are cast then (it leaves fp64 alone)."""
    return x.dtype != torch.float64 and _autocast_is_on(x.device.type)


def _autocast_is_on(kind: str) -> bool:
    """Whether it is for a type of device."""
    return has_autocast(kind) and torch.is_autocast_enabled(kind)


def outside_autocast(x: torch.Tensor):
    """Context for the operator call: its operands are cast already, nothing inside is again."""
    if _autocast_is_on(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def dropout(
    p: float, seed: int | torch.Tensor | None, x: torch.Tensor
) -> tuple[float, torch.Tensor | None]:
    """`(p, seed tensor)`; `(0.0, None)` where nothing would be dropped."""
    if rng.threshold(p) == 0:
        return 0.0, None
    if seed is None:
        seed = rng.new_seed(x.device)
    elif not isinstance(seed, torch.Tensor):
        seed = torch.full((1,), seed, dtype=torch.int64, device=x.device)
    return float(p), seed.reshape(1)


def rows(x: torch.Tensor) -> int:
    """Rows of x [..., in] that a path is chosen for.

    A choice by the number at hand would become a guard: torch.compile compiles anew where it
    fails, but a program of torch.export could not take other numbers.
    """
    found = x.numel() // max(x.shape[-1], 1)
    if torch.compiler.is_exporting():
        from torch.fx.experimental.symbolic_shapes import has_static_value  # loaded by then

        return found if has_static_value(found) else ROWS_OF_AN_EXPORT
    return found


def implementation(
    op: str,
    impl: str | None,
    dtype: torch.dtype,
    device: torch.device,
    trains_weight: bool,
) -> tuple[str, str]:
    """The implementation that runs and why; raises `Unavailable` where none can, or not the named.

    `trains_weight`: the weight asks for a gradient, which only the reference gives.
    """
    if impl == "reference":
        return impl, "it was asked for"
    if trains_weight:
        if impl is None:
            return "reference", "the weight requires a gradient, which only the reference gives"
        raise Unavailable(
            f"{op}: impl={impl!r} takes a frozen weight, but this one requires a gradient"
        )
    if device.type not in (*DEVICES, "meta"):
        raise Unavailable(
            f"{op}: the tensors are on {device.type!r}, and the operators run on 'cpu' and 'cuda'"
            " only; impl='reference' runs on any device"
        )
    if impl == "eager":
        return impl, "it was asked for"
    if impl is None and device.type == "cpu":
        return "eager", "the tensors are on the CPU"
    blocker = why_no_kernels(dtype, device)
    if blocker is None:
        return "triton", "the kernels run on this device" if impl is None else "it was asked for"
    if impl == "triton":
        raise Unavailable(f"{op}: impl='triton' cannot run: {blocker}")
    return "eager", blocker


def why_no_kernels(dtype: torch.dtype, device: torch.device) -> str | None:
    """One sentence saying why kernels cannot take x of `dtype` on `device`, None if they can."""
    blocker = why_no_triton(device)
    if blocker is None and dtype not in TRITON_DTYPES:
        blocker = f"x is {dtype}, and the kernels take float16, bfloat16 and float32"
    return blocker


def reference_mask(
    shape: tuple[int, ...], p: float, seed: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor | None, float]:
    """The mask and keep scale that the reference is given."""
    if seed is None:
        return None, 1.0
    return rng.dropout_mask(shape, p, seed, device), rng.keep_scale(p)


def trains(weight: torch.Tensor | QuantizedWeight) -> bool:
    """Whether a gradient of `weight` is asked for; a quantized one has none."""
    if isinstance(weight, QuantizedWeight):
        return False
    return weight.requires_grad and torch.is_grad_enabled()


def weight_tensors(
    weight: torch.Tensor | QuantizedWeight, dtype: torch.dtype
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """What an operator gets for `weight`: a tensor, and the scale and offset of a quantized one."""
    if isinstance(weight, QuantizedWeight):
        return weight.data, (weight.scale, weight.offset)
    return weight.to(dtype), ()


def dense_weight(weight: torch.Tensor | QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """What the reference gets for `weight`."""
    return weight.dequantize(dtype) if isinstance(weight, QuantizedWeight) else weight.to(dtype)
