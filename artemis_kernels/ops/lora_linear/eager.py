"""`lora_linear` in plain torch calls, forward and hand-written backward: the fast CPU path.

The low-rank term is added by the base product itself or into its output, so nothing of the size of
y is held twice; no gradient of the frozen weight is formed; the mask is drawn again in the
backward, never kept. With `s = x̃ Aᵀ`:

    y  = x Wᵀ + bias + σ·s Bᵀ          dB = σ·dYᵀ s        dS = σ·dY B
    dX = dY W + mask·(dS A)/keep       dA = dSᵀ x̃          dσ = Σ (dYᵀ s) ⊙ B
"""

import torch

from ...core import adapter_passes
from ...core.adapter_passes import LowRankGradients
from ...core.base import Base
from ...core.dropped import Dropout, add_dropped_product_, outer_dropped, project_dropped
from ...core.products import LowRank, column_sum, inner, outer_gradient, project


def forward(
    x: torch.Tensor,  # [M, in]
    base: Base,  # of [out, in]
    lora_a: torch.Tensor,  # [rank, in]
    lora_b: torch.Tensor,  # [out, rank]
    bias: torch.Tensor | None,
    scale: float,
    scale_tensor: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None,
    strategy: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y [M, out] and s [M, rank], both of x's dtype."""
    s = project_dropped(x, lora_a, Dropout(dropout_p, seed) if dropout_p else None)
    return base.product(x, bias, plus=expanded(s, lora_b, scale, scale_tensor)), s


def backward(
    dy: torch.Tensor,  # [M, out]
    x: torch.Tensor | None,  # [M, in]; None unless lora_a needs a gradient
    base: Base,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    s: torch.Tensor,
    scale: float,
    scale_tensor: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None,
    strategy: str,
    needs: tuple[bool, bool, bool, bool, bool],  # x, lora_a, lora_b, scale_tensor, bias
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of x, lora_a, lora_b, scale_tensor and bias, None where not needed."""
    needs_x, needs_a, needs_b, needs_scale, needs_bias = needs
    mask = Dropout(dropout_p, seed) if dropout_p else None
    dx = da = None
    ds, db, dscale, dbias = expand_gradients(
        dy, s, lora_b, scale, scale_tensor, (needs_x or needs_a, needs_b, needs_scale, needs_bias)
    )
    if needs_a:
        da = outer_dropped(ds, x, mask).to(lora_a.dtype)
    if needs_x:
        if mask is None:
            dx = base.input_gradient(dy, plus=LowRank(ds, lora_a.t()))
        else:
            dx = add_dropped_product_(base.input_gradient(dy), ds, lora_a, mask)
    return dx, da, db, dscale, dbias


def expanded(
    s: torch.Tensor, lora_b: torch.Tensor, scale: float, scale_tensor: torch.Tensor | None
) -> LowRank:
    """The term `σ·s Bᵀ` [M, out], for s [M, rank]."""
    number, gain = _read(scale, scale_tensor)
    return LowRank(s if gain is None else s * gain, lora_b, number)


def expand_gradients(
    dy: torch.Tensor,
    s: torch.Tensor,
    lora_b: torch.Tensor,
    scale: float,
    scale_tensor: torch.Tensor | None,
    needs: tuple[bool, bool, bool, bool],  # s, lora_b, scale_tensor, bias
    ds: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of s, lora_b, scale_tensor and the base's bias, None where not needed.

    That of s is written to `ds` [M, rank], where it is given.
    """
    needs_s, needs_b, needs_scale, needs_bias = needs
    dbias = column_sum(dy).to(dy.dtype) if needs_bias else None
    if not (needs_s or needs_b or needs_scale):
        return None, None, None, dbias
    gain = 1.0 if scale_tensor is None else scale_tensor.detach()
    found = adapter_passes.low_rank_backward(
        dy, s, lora_b, scale, gain, needs_s, needs_b, needs_scale, ds
    )
    if found is None:
        found = _by_products(dy, s, lora_b, scale, scale_tensor, needs, ds)
    db = None if found.b is None else found.b.to(lora_b.dtype)
    dscale = None if found.scale is None else found.scale.to(scale_tensor.dtype)
    return found.ds, db, dscale, dbias


def _by_products(dy, s, lora_b, scale, scale_tensor, needs, into) -> LowRankGradients:
    needs_s, needs_b, needs_scale, _ = needs
    ds = db = dscale = None
    if needs_b or needs_scale:
        before_gain = outer_gradient(dy, s, scale)
        if needs_scale:
            dscale = inner(before_gain, lora_b)
        if needs_b:
            db = before_gain if scale_tensor is None else before_gain * scale_tensor
    if needs_s:
        number, gain = _read(scale, scale_tensor)
        ds = project(dy, lora_b.t(), alpha=number)
        ds = ds if gain is None else ds * gain
        ds = ds if into is None else into.copy_(ds)
    return LowRankGradients(ds, db, dscale)


def _read(scale: float, scale_tensor: torch.Tensor | None) -> tuple[float, torch.Tensor | None]:
    """σ as a number, which products take; a tensor stays one where reading it means waiting."""
    if scale_tensor is None or not scale_tensor.is_cpu:
        return scale, scale_tensor
    return scale * float(scale_tensor.detach()), None
