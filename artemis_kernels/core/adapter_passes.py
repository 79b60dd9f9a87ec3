"""What an adapter adds to a product of bf16, and its gradients: `native/adapter_passes.c`.

One call each, where torch and `thin_products` take several. Each function returns None where the
pass does not serve.
"""

from typing import NamedTuple

import torch

from . import native
from .thin_products import FEW_ROWS, HELD, WIDEST, available
from .units import Units


class BottleneckGradients(NamedTuple):
    """dz is where it was asked for; the others are fp32, each with a storage of its own."""

    dz: torch.Tensor  # bf16 [M, width]
    dz_sum: torch.Tensor  # [width]
    up: torch.Tensor | None  # [N, width]
    bias_up: torch.Tensor | None  # [N]
    scale: torch.Tensor  # 0-d


def bottleneck_forward(
    start: torch.Tensor,
    z: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    units: Units,
    factor: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """`start + factor·(h Uᵀ + σ·bias)` [M, N] for z [M, width], U [N, width] and bias [N].

    In `out`, which may be `start`.
    """
    (m, w), n = z.shape, up.shape[0]
    if not _serves(m, w, n, up, start, z):
        return None
    y = torch.empty_like(start, memory_format=torch.contiguous_format) if out is None else out
    bias = None if bias is None else bias.float().contiguous()
    native.library().handle.artemis_bottleneck_forward(
        z.data_ptr(), z.stride(0), *_factor(up), _address(bias),
        start.data_ptr(), start.stride(0), y.data_ptr(), y.stride(0), m, w, n, factor,
        *units.numbers(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def bottleneck_backward(
    dy: torch.Tensor,
    z: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor | None,
    units: Units,
    factor: float,
    needs_up: bool,
    dz: torch.Tensor | None = None,
) -> BottleneckGradients | None:
    """The gradients of `bottleneck_forward` for dY [M, N].

    needs_up: whether those of U and of the bias are found, and that of σ is right where there is
    a bias. dz: where it goes, [M, width] with rows of stride 1; None makes one.
    """
    (m, w), n = z.shape, up.shape[0]
    if not _serves(m, w, n, up, dy, z):
        return None
    dz = z.new_empty(m, w) if dz is None else dz
    dz_sum, dscale = _sums(dy, w), _sums(dy)
    dup, dbias = (_sums(dy, n, w), _sums(dy, n)) if needs_up else (None, None)
    bias = None if bias is None else bias.float().contiguous()
    native.library().handle.artemis_bottleneck_backward(
        dy.data_ptr(), dy.stride(0), *_factor(up), _address(bias),
        z.data_ptr(), z.stride(0), dz.data_ptr(), dz.stride(0), dz_sum.data_ptr(),
        dscale.data_ptr(), _address(dup), _address(dbias),
        m, w, n, factor, *units.numbers(), torch.get_num_threads(),
    )  # fmt: skip
    return BottleneckGradients(dz, dz_sum, dup, dbias, dscale)


class LowRankGradients(NamedTuple):
    """ds is where it was asked for; the others are fp32. None where not needed."""

    ds: torch.Tensor | None  # bf16 [M, r]
    b: torch.Tensor | None  # [N, r]
    scale: torch.Tensor | None  # 0-d


def low_rank_backward(
    dy: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    factor: float,
    gain: float | torch.Tensor,
    needs_s: bool,
    needs_b: bool,
    needs_gain: bool,
    ds: torch.Tensor | None = None,
) -> LowRankGradients | None:
    """The gradients of `factor·gain·s Bᵀ` for dY [M, N], s [M, r] and B [N, r].

    ds: where that of s goes, [M, r] with rows of stride 1; None makes one.
    """
    (m, r), n = s.shape, b.shape[0]
    if not _serves(m, r, n, b, dy, s):
        return None
    if needs_s and ds is None:
        ds = s.new_empty(m, r)
    db = _sums(dy, n, r) if needs_b or needs_gain else None
    dgain = _sums(dy) if needs_gain else None
    native.library().handle.artemis_low_rank_backward(
        dy.data_ptr(), dy.stride(0), *_factor(b), s.data_ptr(), s.stride(0), _address(ds),
        0 if ds is None else ds.stride(0), _address(db), _address(dgain), m, r, n, factor,
        float(gain), torch.get_num_threads(),
    )  # fmt: skip
    return LowRankGradients(ds, db if needs_b else None, dgain)


def _serves(
    m: int, width: int, n: int, factor: torch.Tensor, wide: torch.Tensor, thin: torch.Tensor
) -> bool:
    """Whether the passes take a factor [n, width] with rows of bf16, [m, n] and [m, width]."""
    if m < FEW_ROWS or not 0 < width <= WIDEST or not n or factor.dtype not in HELD:
        return False
    if wide.dtype != torch.bfloat16 or thin.dtype != torch.bfloat16 or not wide.is_cpu:
        return False
    return (wide.stride(1) == 1 or n == 1) and (thin.stride(1) == 1 or width == 1) and available()


def _factor(factor: torch.Tensor) -> tuple[int, int, int, int]:
    """A thin factor [N, width] as the passes take it."""
    return factor.data_ptr(), *factor.stride(), HELD[factor.dtype]


def _sums(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
