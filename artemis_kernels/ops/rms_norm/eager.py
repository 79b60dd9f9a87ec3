"""`rms_norm` on a CPU: a compiled pass each way, a row at a time, else plain torch.

    forward    r = 1/√(mean x² + eps)    y = x·r·w
    backward   dx = r·(g − x̂·mean(g·x̂)),  g = dy·w,  x̂ = x·r        dw = Σ_rows dy·x̂

Kept for the backward: x alone; r is found again, from a row that is read anyway.
"""

import torch

from ...core import native
from ...core.widened import widened

_ROWS_OF_A_SUM = 64  # as in native/rms_norm.c


def forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [M, n], weight [n] -> y [M, n] in x's dtype."""
    library = native.library_for(x)
    if library is None:
        wide = widened(x)
        return (wide * _inverse(wide, eps) * weight).to(x.dtype)
    x, weight, (m, n) = x.contiguous(), weight.float().contiguous(), x.shape
    y = torch.empty_like(x)
    getattr(library, f"artemis_rms_norm_forward_{native.NAMES[x.dtype]}")(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), m, n, eps, torch.get_num_threads()
    )
    return y


def backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, needs_weight: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx [M, n] in x's dtype and, where it is asked for, dw [n] in weight's."""
    library = native.library_for(x)
    if library is None:
        return _plain_backward(dy, x, weight, eps, needs_weight)
    dy, x, wide, (m, n) = dy.contiguous(), x.contiguous(), weight.float().contiguous(), x.shape
    dx, sums = torch.empty_like(x), None
    if needs_weight:
        sums = x.new_empty(-(-m // _ROWS_OF_A_SUM), n, dtype=torch.float32)
    getattr(library, f"artemis_rms_norm_backward_{native.NAMES[x.dtype]}")(
        dy.data_ptr(), x.data_ptr(), wide.data_ptr(), dx.data_ptr(),
        None if sums is None else sums.data_ptr(), m, n, eps, torch.get_num_threads(),
    )  # fmt: skip
    return dx, None if sums is None else sums.sum(0).to(weight.dtype)


def _plain_backward(dy, x, weight, eps, needs_weight):
    wide = widened(x)
    inverse = _inverse(wide, eps)
    normal, dy = wide * inverse, dy.to(wide.dtype)
    g = dy * weight
    dx = inverse * (g - normal * (g * normal).mean(-1, keepdim=True))
    dweight = (dy * normal).sum(0).to(weight.dtype) if needs_weight else None
    return dx.to(x.dtype), dweight


def _inverse(wide: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
