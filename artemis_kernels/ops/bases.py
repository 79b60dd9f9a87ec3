"""The frozen base as each implementation takes it, from an operator's tensors and strategy."""

from typing import NamedTuple

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
    if scale is None:
        return weight
    from .packed import steps  # imports triton

    return steps.of(weight, scale, offset, strategy)


def held_member(impl: str, member: NamedTuple, strategy: str):
    """The same of a group's member, which has `weight`, `weight_scale` and `weight_offset`."""
    return held(impl, member.weight, member.weight_scale, member.weight_offset, strategy)
