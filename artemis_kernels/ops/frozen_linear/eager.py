"""`frozen_linear` in plain torch calls: the base's product, then two thin ones."""

import torch

from ...core.activations import ACTIVATIONS
from ...core.base import Base
from ...core.frozen import FrozenAdapter
from ...core.products import project


def forward(
    x: torch.Tensor,  # [M, in]
    base: Base,  # of [out, in]
    adapter: FrozenAdapter,
) -> torch.Tensor:
    """Return y [M, out]."""
    y = base.product(x, adapter.bias)
    source = y if adapter.reads_output else x
    if adapter.bias_down is None:
        z = project(source, adapter.down)
    else:
        z = torch.addmm(adapter.bias_down, source, adapter.down.t())
    h = ACTIVATIONS[adapter.activation].forward(z)
    if isinstance(adapter.scale, torch.Tensor):
        return y.addmm_(h * adapter.scale, adapter.up.t())
    return y.addmm_(h, adapter.up.t(), alpha=adapter.scale)
