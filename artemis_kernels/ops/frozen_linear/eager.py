"""`frozen_linear` in plain torch calls: the base's product, then two thin ones."""

import torch

from ...core.activations import ACTIVATIONS
from ...core.base import Base
from ...core.frozen import FrozenAdapter
from ...core.products import LowRank, project


def forward(
    x: torch.Tensor,  # [M, in]
    base: Base,  # of [out, in]
    adapter: FrozenAdapter,
) -> torch.Tensor:
    """Return y [M, out]."""
    if not adapter.rank:
        return base.product(x, adapter.bias)
    if adapter.reads_output:
        y = base.product(x, adapter.bias)
        return LowRank.added_to(y, _term(y, adapter))
    return base.product(x, adapter.bias, plus=_term(x, adapter))


def _term(source: torch.Tensor, adapter: FrozenAdapter) -> LowRank:
    """What the adapter adds, from the tensor [M, ...] it reads."""
    z = project(source, adapter.down, adapter.bias_down)
    h = ACTIVATIONS[adapter.activation].forward(z)
    if isinstance(adapter.scale, torch.Tensor):
        return LowRank(h * adapter.scale, adapter.up)
    return LowRank(h, adapter.up, adapter.scale)
