"""Compiled passes over a packed weight, which is read once: few rows by it, and a copy of it.

Each returns None where no pass is compiled for its operands; callers have a plain-torch way.
"""

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from . import native
from .device import has_fast_bf16

if TYPE_CHECKING:
    from .quantized import QuantizedWeight

FORMATS = ("int8", "fp8", "int4")  # as numbered in native/formats.h


def few_rows(x: torch.Tensor, weight: "QuantizedWeight") -> torch.Tensor | None:
    """`x Wᵀ` in fp32 for x [M <= 8, in] without a copy of W; None where no pass is compiled."""
    library = native.library_for(x)
    if library is None:
        return None
    if takes_bf16_rows(x, weight):
        return _few_bf16_rows(library, x, weight)
    x = x.float().contiguous()
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty(m, n)
    packed = _contiguous(weight)
    library.artemis_few_rows(
        x.data_ptr(), *_pointers(packed), y.data_ptr(), m, k, n, weight.group_size or 0,
        FORMATS.index(weight.format), torch.get_num_threads(),
    )  # fmt: skip
    return y


def takes_bf16_rows(x: torch.Tensor, weight: "QuantizedWeight") -> bool:
    """Whether `few_rows` multiplies in bf16, exact products and fp32 sums, for any M."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or not has_bf16_rows():
        return False
    return (weight.group_size or 64) % 64 == 0


def has_bf16_rows() -> bool:
    """Whether processor and compiler have the passes over few rows of bf16."""
    handle = native.library().handle if has_fast_bf16() else None
    return handle is not None and native.has(handle, "bf16_rows")


has_bf16_rows._dynamo_marked_constant = True  # a fact of the machine, as in device.py


def padded_rows(m: int) -> int:
    """Rows of x that the passes of native/dots.h take for m of them."""
    return m if m == 1 else 4 if m <= 4 else -(-m // 8) * 8


def padded_columns(k: int) -> int:
    """Numbers of a row of x there."""
    return -(-k // 32) * 32


def unpacked(weight: "QuantizedWeight", dtype: torch.dtype) -> torch.Tensor | None:
    """The weight [out, in] in `dtype`, fp32 or bf16; None where no pass is compiled."""
    if weight.device.type != "cpu" or dtype not in native.NAMES:
        return None
    library = native.library().handle
    if library is None:
        return None
    out = weight.data.new_empty(weight.shape, dtype=dtype)
    packed = _contiguous(weight)
    getattr(library, f"artemis_unpack_{native.NAMES[dtype]}")(
        *_pointers(packed), out.data_ptr(), *weight.shape, weight.group_size or 0,
        FORMATS.index(weight.format), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _few_bf16_rows(library, x: torch.Tensor, weight: "QuantizedWeight") -> torch.Tensor:
    (m, k), n, size = x.shape, weight.shape[0], weight.group_size
    rows, pitch = padded_rows(m), padded_columns(k)
    x = functional.pad(x, (0, pitch - k, 0, rows - m)).contiguous()
    sums = None if size is None else x[:, :k].reshape(rows, -1, size).sum(2, dtype=torch.float32)
    y = x.new_empty(m, n, dtype=torch.float32)
    packed = _contiguous(weight)
    library.artemis_few_rows_bf16(
        x.data_ptr(), None if sums is None else sums.data_ptr(), *_pointers(packed), y.data_ptr(),
        m, pitch, k, n, size or 0, FORMATS.index(weight.format), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _contiguous(weight: "QuantizedWeight") -> tuple[torch.Tensor | None, ...]:
    parts = (weight.data, weight.scale, weight.offset)
    return tuple(None if part is None else part.contiguous() for part in parts)


def _pointers(parts: tuple[torch.Tensor | None, ...]) -> tuple[int | None, ...]:
    return tuple(None if part is None else part.data_ptr() for part in parts)
