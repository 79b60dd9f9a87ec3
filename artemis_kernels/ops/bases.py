"""The frozen base as each implementation takes it, from an operator's tensors and strategy."""

import torch

from ..core import base


def held(
    impl: str,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    strategy: str,
):
    """A `Base` for the eager path; for the kernels a tensor, or a `Packed` weight."""
    if impl == "eager":
        return base.of(weight, scale, offset, strategy)
    from .packed import steps  # imports triton

    return steps.of(weight, scale, offset, strategy)
