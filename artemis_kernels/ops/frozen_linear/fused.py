"""`frozen_linear` in Triton: which launches, in which order.

    one_pass          one kernel for x Wᵀ and x Fᵀ; a linear adapter that reads x
    split, vendor     shrink of x (bias and activation in it), then the base product with the
                      adapter in its accumulator, or the vendor's product and an update
    product           the base product, shrink of its output, an update

Over a packed weight the strategy's end says how it is multiplied (`ops.packed.steps`).
"""

import torch

from ...core import device, tuning
from ...core.frozen import FrozenAdapter
from ...core.tiling import Shape
from ...core.types import Scale as Given
from ..low_rank.arguments import Scale
from ..low_rank.one_pass import one_pass
from ..low_rank.steps import shrunk, updated
from ..packed.steps import Packed, expanded, product


@device.launches_on_first_argument
def forward(
    x: torch.Tensor,  # [M, in]
    weight: torch.Tensor | Packed,  # [out, in]
    adapter: FrozenAdapter,
    strategy: str,
) -> torch.Tensor:
    """Return y [M, out]."""
    chip, sigma = device.chip(x.device), Scale(*Given.of(adapter.scale))
    down, up, bias = adapter.down, adapter.up, adapter.bias
    if not adapter.rank:
        return product(x, weight, bias, chip)
    if strategy == "one_pass":
        shape = Shape(x.shape[0], weight.shape[0], x.shape[1], down.shape[0], x.dtype)
        config = tuning.config("one_pass", shape, chip)
        return one_pass(x, weight, down, up, config=config, bias=bias, scale=sigma)[0]
    if adapter.reads_output:
        y = product(x, weight, bias, chip)
        return updated(y, hidden(y, adapter, chip), up, chip, dtype=x.dtype, scale=sigma)
    return expanded(
        x, weight, hidden(x, adapter, chip), up, chip, vendor="vendor" in strategy, bias=bias,
        scale=sigma,
    )  # fmt: skip


def hidden(x: torch.Tensor, adapter: FrozenAdapter, chip: device.Chip) -> torch.Tensor:
    """`act(x Fᵀ + c)` [M, r] in fp32, by one launch."""
    if adapter.is_linear:
        return shrunk(x, adapter.down, chip)[0]
    return shrunk(
        x, adapter.down, chip, stage="forward", bias=adapter.bias_down, with_h=True,
        activation=adapter.activation,
    )[1]  # fmt: skip
