"""Products of bf16 matrices of which one is thin: `native/thin_product.c`, one call of it.

BLAS computes them about as fast once all its operands are in bf16; but parameters are held in
fp32, and would be copied first, and gradients of them copied back, having been rounded to bf16.
Both are part of the pass here, as are a factor, a bias and the tensor the product is added to.
"""

import torch

from . import native

#: As numbered in native/thin_tiles.h.
HELD = {torch.bfloat16: 0, torch.float32: 1, torch.int8: 2}
_ADDED, _ROUNDED, _WIDE, _TRANSPOSED = range(4)  # likewise: what becomes of the sums
WIDEST = 128  # of a thin side; beyond, BLAS blocks for the caches better
FEW_ROWS = 16  # below, packing a factor that lies the other way round costs more than it gains


def available() -> bool:
    """Whether this processor and compiler have the pass."""
    return native.over_bf16("thin_product") is not None


def multiply(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    by_columns: bool = False,
    start: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alpha: float = 1.0,
) -> torch.Tensor | None:
    """`start + bias + alpha·a b` for a [M, K] and b [K, N]; None where the pass does not serve.

    a and b in bf16, in int8, or rounded to bf16 from fp32. The thin one has any strides, of which
    one is 1 for a; the other has rows of stride 1.

    Args:
        out: [M, N], bf16 with rows of stride 1, or fp32 with rows or columns of stride 1; None
            makes one, of `dtype`, with columns of stride 1 where `by_columns` (fp32 only).
        start: [M, N], bf16 with rows of stride 1; only for a result in bf16; it may be `out`.
        bias: [N] or None.
    """
    library = native.over_bf16("thin_product") if a.is_cpu else None
    held_a, held_b = HELD.get(a.dtype), HELD.get(b.dtype)
    if library is None or held_a is None or held_b is None:
        return None
    (m, k), n, of_a, of_b = a.shape, b.shape[1], _strides(a), _strides(b)
    if not 0 < min(m, k, n) <= WIDEST or not _read_fast(m, k, n, of_a, of_b):
        return None
    if out is None:
        out = a.new_empty((n, m) if by_columns else (m, n), dtype=dtype)
        out = out.t() if by_columns else out
    of_out = _strides(out)
    kind = _kind(out, of_out, start)
    if kind is None:
        return None
    bias = None if bias is None else bias.float().contiguous()
    library.artemis_thin_product(
        a.data_ptr(), *of_a, held_a, b.data_ptr(), *of_b, held_b,
        None if start is None else start.data_ptr(), 0 if start is None else start.stride(0),
        None if bias is None else bias.data_ptr(), alpha,
        out.data_ptr(), of_out[kind == _TRANSPOSED], None, kind, m, k, n, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _read_fast(m: int, k: int, n: int, of_a: tuple[int, int], of_b: tuple[int, int]) -> bool:
    """Whether neither factor takes a copy, or a packing across its rows, as large as a weight."""
    if of_a[1] != 1 and (of_a[0] != 1 or m > WIDEST):
        return False
    return of_b[1] == 1 or (m >= FEW_ROWS and min(k, n) <= WIDEST)


def _kind(out: torch.Tensor, of_out: tuple[int, int], start: torch.Tensor | None) -> int | None:
    """What becomes of the sums; None where out and start do not fit the pass."""
    rows, columns = of_out
    if out.dtype == torch.bfloat16 and columns == 1:
        if start is None:
            return _ROUNDED
        return _ADDED if start.dtype == torch.bfloat16 and _strides(start)[1] == 1 else None
    if out.dtype == torch.float32 and start is None:
        return _WIDE if columns == 1 else _TRANSPOSED if rows == 1 else None
    return None


def _strides(matrix: torch.Tensor) -> tuple[int, int]:
    """Its strides; 1 for a dimension of size 1, along which nothing steps."""
    if 1 not in matrix.shape:
        return matrix.stride()
    (rows, columns), (row, column) = matrix.shape, matrix.stride()
    return 1 if rows == 1 else row, 1 if columns == 1 else column
