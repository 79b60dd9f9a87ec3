"""A dropped x on the CPU: alone, or inside a thin product that never stores it.

Each function has two ways: a pass of `native/dropped.c`, or plain torch with `rng.dropout_mask`.
Both drop the same elements. `seed` is the one-element tensor of the call.
"""

import ctypes
from typing import NamedTuple

import torch

from . import native, rng
from .products import LowRank, outer_gradient, project

_MOST_ROWS = 32  # of the thin factor; beyond, BLAS on a stored x̃ is faster


class Dropout(NamedTuple):
    """The mask of one call: probability and seed."""

    p: float
    seed: torch.Tensor

    @staticmethod
    def arguments(mask: "Dropout | None") -> tuple[int, int, float]:
        """Seed, threshold and keep scale for a compiled pass; a threshold of 0 keeps everything."""
        if mask is None:
            return 0, 0, 1.0
        return int(mask.seed) % (1 << 64), rng.threshold(mask.p), rng.keep_scale(mask.p)


def dropped(x: torch.Tensor, mask: Dropout) -> torch.Tensor:
    """`x` with dropped elements 0 and kept ones scaled: a new tensor, row-major."""
    x = x.contiguous()
    library = native.library_for(x)
    if library is None:
        keep = rng.dropout_mask(x.shape, *mask, x.device)
        return torch.where(keep, x * rng.keep_scale(mask.p), 0)
    return _drop(library, x, torch.empty_like(x), mask, accumulate=False)


def add_dropped_(y: torch.Tensor, x: torch.Tensor, mask: Dropout) -> torch.Tensor:
    """`y += dropped(x)` in place, for y and x of one shape, both row-major."""
    library = native.library_for(x)
    if library is None:
        return y.add_(dropped(x, mask))
    return _drop(library, x, y, mask, accumulate=True)


def _drop(library, x: torch.Tensor, out: torch.Tensor, mask: Dropout, accumulate: bool):
    getattr(library, f"artemis_dropout_{native.NAMES[x.dtype]}")(
        x.data_ptr(), out.data_ptr(), x.numel(), *Dropout.arguments(mask), accumulate,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def project_dropped(x: torch.Tensor, f: torch.Tensor, mask: Dropout | None) -> torch.Tensor:
    """`dropped(x) fᵀ` for x [M, K] and f [R, K], in x's dtype."""
    library = _passes(x, f.shape[0], mask, (torch.float32, torch.bfloat16))
    if library is None:
        return project(x if mask is None else dropped(x, mask), f)
    x, f = x.contiguous(), f.to(x.dtype).to(torch.float32).contiguous()
    s = x.new_empty(x.shape[0], f.shape[0])
    _product(library, "shrink", x.dtype, (x, f, s), (*x.shape, f.shape[0]), mask)
    return s


def outer_dropped(ds: torch.Tensor, x: torch.Tensor, mask: Dropout | None) -> torch.Tensor:
    """`dsᵀ dropped(x)` for ds [M, R] and x [M, K], in fp32 (of fp64 in fp64)."""
    library = _passes(x, ds.shape[1], mask, (torch.float32,))
    if library is None:
        return outer_gradient(ds, x if mask is None else dropped(x, mask))
    rows_of_a_part = 64  # as in native/dropped.c
    x, ds = x.contiguous(), ds.to(torch.float32).contiguous()
    parts = ds.new_zeros(-(-x.shape[0] // rows_of_a_part), ds.shape[1], x.shape[1])
    _product(library, "outer", x.dtype, (ds, x, parts), (*x.shape, ds.shape[1]), mask)
    return parts.sum(0)


def add_dropped_product_(
    dx: torch.Tensor, ds: torch.Tensor, a: torch.Tensor, mask: Dropout | None
) -> torch.Tensor:
    """`dx += dropped(ds a)` in place, for dx [M, K] row-major, ds [M, R] and a [R, K]."""
    library = _passes(dx, ds.shape[1], mask, (torch.float32,))
    if library is None:
        term = LowRank(ds, a.t())
        if mask is None:
            return LowRank.added_to(dx, term)
        return add_dropped_(dx, term.product(dx.dtype), mask)
    ds, a = ds.to(torch.float32).contiguous(), a.to(torch.float32).contiguous()
    _product(library, "expand", dx.dtype, (ds, a, dx), (*dx.shape, ds.shape[1]), mask)
    return dx


def _passes(
    x: torch.Tensor, rank: int, mask: Dropout | None, dtypes: tuple[torch.dtype, ...]
) -> ctypes.CDLL | None:
    """The compiled passes where they beat BLAS on a stored x̃: few rows, and one of `dtypes`."""
    if mask is None or rank > _MOST_ROWS or x.dtype not in dtypes:
        return None
    return native.library_for(x)


def _product(library, name: str, dtype: torch.dtype, tensors, sizes, mask: Dropout) -> None:
    function = getattr(library, f"artemis_{name}_{native.NAMES[dtype]}")
    pointers = (tensor.data_ptr() for tensor in tensors)
    function(*pointers, *sizes, *Dropout.arguments(mask), torch.get_num_threads())
