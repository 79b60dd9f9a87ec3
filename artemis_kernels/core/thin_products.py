"""Products of bf16 matrices of which one is thin: `native/thin_product.c`, one call of it.

BLAS computes them about as fast once all its operands are in bf16; but parameters are held in
fp32, and would be copied first, and gradients of them copied back, having been rounded to bf16.
Both are part of the pass here, as are a factor, a bias and the tensor the product is added to.
"""

import torch

from . import native
from .device import has_bf16_dots

_HELD = (torch.bfloat16, torch.float32, torch.int8)  # as numbered in native/thin_product.c
_ADDED, _ROUNDED, _WIDE, _TRANSPOSED = range(4)  # likewise: what becomes of the sums
THINNEST_SIDE = 128  # up to here; beyond, BLAS blocks for the caches better


def multiply(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    *,
    start: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alpha: float = 1.0,
) -> bool:
    """`out = start + bias + alpha·a b` for a [M, K] and b [K, N]; False where nothing is done.

    a and b in bf16, int8, or rounded to bf16 from fp32, b of any strides and a with either of
    stride 1. out [M, N]: bf16 with rows of stride 1, or fp32 with either. start [M, N]: bf16, with
    rows of stride 1, only for an out in bf16, which it may be. bias: fp32 [N] or None.
    """
    (m, k), n, kind = a.shape, b.shape[1], _kind(out, start)
    if kind is None or not 0 < min(m, k, n) <= THINNEST_SIDE or 1 not in _strides(a):
        return False
    if out.device.type != "cpu" or not {a.dtype, b.dtype}.issubset(_HELD):
        return False
    handle = native.library().handle if has_bf16_dots() else None
    if handle is None or not native.has(handle, "thin_product"):
        return False
    handle.artemis_thin_product(
        a.data_ptr(), *_strides(a), _HELD.index(a.dtype),
        b.data_ptr(), *b.stride(), _HELD.index(b.dtype),
        None if start is None else start.data_ptr(), 0 if start is None else start.stride(0),
        None if bias is None else bias.data_ptr(), alpha,
        out.data_ptr(), _strides(out)[kind == _TRANSPOSED], kind, m, k, n, torch.get_num_threads(),
    )  # fmt: skip
    return True


def _kind(out: torch.Tensor, start: torch.Tensor | None) -> int | None:
    """What becomes of the sums; None where out and start do not fit the pass."""
    rows, columns = _strides(out)
    if out.dtype == torch.bfloat16 and columns == 1:
        if start is None:
            return _ROUNDED
        return _ADDED if start.dtype == torch.bfloat16 and _strides(start)[1] == 1 else None
    if out.dtype == torch.float32 and start is None:
        return _WIDE if columns == 1 else _TRANSPOSED if rows == 1 else None
    return None


def _strides(matrix: torch.Tensor) -> tuple[int, int]:
    """Its strides, those that are never taken 1."""
    rows, columns = (
        1 if size == 1 else stride
        for size, stride in zip(matrix.shape, matrix.stride(), strict=True)
    )
    return rows, columns
