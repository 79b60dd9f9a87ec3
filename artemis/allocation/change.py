"""What becomes of one tensor when its modules change size."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Change:
    """What becomes of one parameter, or of its leading part, along its dimension of units.

    `value` [new, old] makes the new parameter; a gradient changes by `moment` [new, old].
    """

    parameter: nn.Parameter
    dim: int
    value: torch.Tensor
    moment: torch.Tensor
    #: What the units start from that `value` makes from nothing; None: from zero.
    fresh: torch.Tensor | None = None

    def applied(self) -> torch.Tensor:
        """The new parameter."""
        new = along(self.value, self.parameter.detach(), self.dim)
        if self.fresh is not None:
            made = ~self.value.any(1)
            new[made.to(new.device)] = self.fresh[made.cpu()].to(new)
        return new


def along(matrix: torch.Tensor, tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Return `tensor` with `matrix` [new, old] applied along `dim`, in its own dtype."""
    moved = tensor.double().movedim(dim, 0)
    product = torch.tensordot(matrix.to(moved.device), moved, dims=1)
    return product.movedim(0, dim).to(tensor.dtype).contiguous()
