"""A dropped x on the CPU: alone, or inside a thin product that never stores it.

Each function has two ways: a pass of `native/dropped.c`, or plain torch with `rng.dropout_mask`.
Both drop the same elements. `seed` is the one-element tensor of the call.
"""

import ctypes
from typing import NamedTuple

import torch

from . import native, rng
from .products import outer_gradient, project

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_MOST_ROWS = 32  # of the thin factor; beyond, BLAS on a stored x̃ is faster


class Dropout(NamedTuple):
    """The mask of one call: probability and seed."""

    p: float
    seed: torch.Tensor


def dropped(x: torch.Tensor, mask: Dropout) -> torch.Tensor:
    """`x` with dropped elements 0 and kept ones scaled: a new tensor, row-major."""
    x = x.contiguous()
    library = _library(x)
    if library is None:
        keep = rng.dropout_mask(x.shape, *mask, x.device)
        return torch.where(keep, x * rng.keep_scale(mask.p), 0)
    out = torch.empty_like(x)
    function = getattr(library, f"artemis_dropout_{_NAMES[x.dtype]}")
    function(x.data_ptr(), out.data_ptr(), x.numel(), *_bits(mask), 0, torch.get_num_threads())
    return out


def project_dropped(x: torch.Tensor, f: torch.Tensor, mask: Dropout | None) -> torch.Tensor:
    """`dropped(x) fᵀ` for x [M, K] and f [R, K], in x's dtype."""
    if mask is None:
        return project(x, f)
    library = _library(x) if f.shape[0] <= _MOST_ROWS else None
    if library is None:
        return project(dropped(x, mask), f)
    x, f = x.contiguous(), f.to(torch.float32).contiguous()
    s = x.new_empty(x.shape[0], f.shape[0])
    _product(library, "shrink", x.dtype, (x, f, s), (*x.shape, f.shape[0]), mask)
    return s


def outer_dropped(ds: torch.Tensor, x: torch.Tensor, mask: Dropout | None) -> torch.Tensor:
    """`dsᵀ dropped(x)` for ds [M, R] and x [M, K]: fp32 from the compiled pass, else x's dtype."""
    if mask is None:
        return outer_gradient(ds, x)
    library = _library(x) if ds.shape[1] <= _MOST_ROWS else None
    if library is None:
        return outer_gradient(ds, dropped(x, mask))
    rows_of_a_part = 64  # as in native/dropped.c
    x, ds = x.contiguous(), ds.to(torch.float32).contiguous()
    parts = torch.zeros(-(-x.shape[0] // rows_of_a_part), ds.shape[1], x.shape[1])
    _product(library, "outer", x.dtype, (ds, x, parts), (*x.shape, ds.shape[1]), mask)
    return parts.sum(0)


def add_dropped_product_(
    dx: torch.Tensor, ds: torch.Tensor, a: torch.Tensor, mask: Dropout | None
) -> torch.Tensor:
    """`dx += dropped(ds a)` in place, for dx [M, K] row-major, ds [M, R] and a [R, K]."""
    if mask is None:
        return dx.addmm_(ds, a)
    library = _library(dx) if ds.shape[1] <= _MOST_ROWS else None
    if library is None:
        return dx.add_(dropped(torch.mm(ds, a), mask))
    ds, a = ds.to(torch.float32).contiguous(), a.to(torch.float32).contiguous()
    _product(library, "expand", dx.dtype, (ds, a, dx), (*dx.shape, ds.shape[1]), mask)
    return dx


def _library(x: torch.Tensor) -> ctypes.CDLL | None:
    if x.device.type != "cpu" or x.dtype not in _NAMES:
        return None
    return native.library().handle


def _bits(mask: Dropout) -> tuple[int, int, float]:
    return int(mask.seed) % (1 << 64), rng.threshold(mask.p), rng.keep_scale(mask.p)


def _product(library, name: str, dtype: torch.dtype, tensors, sizes, mask: Dropout) -> None:
    function = getattr(library, f"artemis_{name}_{_NAMES[dtype]}")
    pointers = (tensor.data_ptr() for tensor in tensors)
    function(*pointers, *sizes, *_bits(mask), torch.get_num_threads())
