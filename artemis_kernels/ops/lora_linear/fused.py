"""`lora_linear` in Triton: which launches, in which order.

    one_pass   one kernel for x Wᵀ and x Aᵀ
    split      shrink, then the base product with the low-rank term in its accumulator
    vendor     shrink, the vendor's base product, then an update of its output

Over a packed weight the strategy's end says how it is multiplied (`ops.packed.steps`).

The backward reads dY once for dS and dB (twice beyond rank 64), x once for dA, and computes dX
like the forward computes y. S is unscaled and fp32; the scale, a device scalar perhaps,
multiplies in fp32 at each store.
"""

import torch

from ...core import device, tuning
from ...core.tiling import Shape
from ..low_rank.arguments import Dropout, Scale
from ..low_rank.one_pass import one_pass
from ..low_rank.steps import expand_gradients, shrunk, sum_over_rows
from ..packed.steps import Packed, expanded


def forward(
    x: torch.Tensor,  # [M, in]
    weight: torch.Tensor | Packed,  # [out, in]
    lora_a: torch.Tensor,  # [rank, in]
    lora_b: torch.Tensor,  # [out, rank]
    bias: torch.Tensor | None,
    scale: float,
    scale_tensor: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None,
    strategy: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y [M, out] in x's dtype and s = dropout(x) Aᵀ [M, rank] in fp32."""
    chip = device.chip(x.device)
    sigma = Scale(scale, scale_tensor)
    if strategy == "one_pass":
        if dropout_p:
            raise ValueError("the one_pass strategy draws no dropout mask; take split or vendor")
        shape = Shape(x.shape[0], weight.shape[0], x.shape[1], lora_a.shape[0], x.dtype)
        config = tuning.config("one_pass", shape, chip)
        return one_pass(x, weight, lora_a, lora_b, config=config, bias=bias, scale=sigma)
    s, _ = shrunk(x, lora_a, chip, dropout=Dropout(dropout_p, seed))
    vendor = strategy.startswith("vendor")
    y = expanded(x, weight, s, lora_b, chip, vendor=vendor, bias=bias, scale=sigma)
    return y, s


def backward(
    dy: torch.Tensor,  # [M, out]
    x: torch.Tensor | None,  # [M, in]; None unless lora_a needs a gradient
    weight: torch.Tensor | Packed,
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
    chip = device.chip(dy.device)
    sigma, dropout = Scale(scale, scale_tensor), Dropout(dropout_p, seed)
    dx = da = dscale = dbias = None
    gradients = expand_gradients(
        dy, lora_b, s, chip, hidden=None, scale=sigma, wants_hidden=needs_x or needs_a,
        wants_b=needs_b, wants_dot=needs_scale, wants_columns=needs_bias,
    )  # fmt: skip
    if needs_a:
        da = torch.empty_like(lora_a, memory_format=torch.contiguous_format)
        sum_over_rows(x, gradients.hidden, da, chip, scale=sigma, dropout=dropout)
    if needs_x:
        dx = expanded(
            dy, weight.t(), gradients.hidden, lora_a.t(), chip,
            vendor=strategy.startswith("vendor"), scale=sigma, dropout=dropout,
        )  # fmt: skip
    if needs_scale:
        dscale = sigma.gradient(gradients.dot)
    if needs_bias:
        dbias = gradients.columns.to(dy.dtype)
    return dx, da, gradients.b if needs_b else None, dscale, dbias
