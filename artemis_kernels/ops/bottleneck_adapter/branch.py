"""`σ·(dropout(act(z)) Uᵀ + b_u)` on the eager path: what every bottleneck adds, and its backward.

With `h = dropout(act(z))`:

    dU = σ·dYᵀ h     db_u = σ·Σ dY     dh = dY U     dz = σ·dh·mask/keep·act'(z)
    dσ = Σ dh ⊙ h + Σ dY·b_u
"""

from typing import NamedTuple

import torch

from ...core import adapter_passes
from ...core.dropped import Dropout
from ...core.products import LowRank, accumulator, column_sum, inner, outer_gradient, project
from ...core.units import Units


class BranchNeeds(NamedTuple):
    """Which gradients of parameters are asked for; groups say it by the same names."""

    up: bool
    scale_tensor: bool
    bias_up: bool


class BranchGradients(NamedTuple):
    """Gradients inside the branch: dz [M, width] and its sum over rows [width] in fp32 or better,
    the others of their parameters' shapes and dtypes; None where not needed."""

    dz: torch.Tensor
    dz_sum: torch.Tensor
    dup: torch.Tensor | None
    dscale: torch.Tensor | None
    dbias_up: torch.Tensor | None


class Branch(NamedTuple):
    """The operands of the branch; `σ = scale · scale_tensor`."""

    up: torch.Tensor  # [out, width]
    bias_up: torch.Tensor | None
    scale: float
    scale_tensor: torch.Tensor | None
    activation: str
    dropout_p: float
    seed: torch.Tensor | None

    def added(self, start: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """`start` [M, out] plus the branch, as a new tensor, for z [M, width]."""
        y = self._in_one_pass(start, z)
        return self._term(z).plus(start) if y is None else y

    def add_(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Add the branch to y [M, out] in place, for z [M, width]."""
        if self._in_one_pass(y, z, y) is not None:
            return y
        return LowRank.added_to(y, self._term(z))

    def backward(
        self,
        dy: torch.Tensor,
        z: torch.Tensor,
        needs: BranchNeeds,
        dz: torch.Tensor | None = None,
    ) -> BranchGradients:
        """Gradients for dy [M, out]; that of z is written to `dz` [M, width], where it is given."""
        through_bias = self.bias_up is not None and (needs.scale_tensor or needs.bias_up)
        found = adapter_passes.bottleneck_backward(
            dy, z, self.up, self.bias_up, self._units, self.scale, needs.up or through_bias, dz
        )
        if found is None:
            return self._backward_by_steps(dy, z, needs, through_bias, dz)
        return BranchGradients(
            found.dz,
            found.dz_sum,
            found.up.to(self.up.dtype) if needs.up else None,
            found.scale.to(self.scale_tensor.dtype) if needs.scale_tensor else None,
            found.bias_up.to(self.bias_up.dtype) if needs.bias_up else None,
        )

    def _backward_by_steps(self, dy, z, needs, through_bias, dz) -> BranchGradients:
        width, wide = z.shape[1], dy.dtype == accumulator(dy.dtype)
        column = through_bias and not wide
        needs_h = needs.up or column
        dh = project(dy, self.up.t())
        units = self._units.backward(z, dh, self.scale, column, needs_h, dz)
        dup = dscale = dbias_up = summed = None
        if needs_h:
            joint = outer_gradient(dy, units.h, self.scale)
            # A part of `joint` would keep all of it alive.
            layout = {"copy": column, "memory_format": torch.contiguous_format}
            dup = joint[:, :width].to(self.up.dtype, **layout)
        if through_bias:
            # A product adds row by row: in fp32 that loses digits which a sum by halves keeps.
            summed = column_sum(dy) * self.scale if wide else joint[:, width]
        if needs.bias_up:
            through = summed if self.scale_tensor is None else summed * self.scale_tensor
            dbias_up = through.to(self.bias_up.dtype, copy=not wide)
        if needs.scale_tensor:
            dscale = units.inner * self.scale
            if through_bias:
                dscale = dscale + inner(summed, self.bias_up)
            dscale = dscale.to(self.scale_tensor.dtype)
        return BranchGradients(units.dz, units.dz_sum, dup if needs.up else None, dscale, dbias_up)

    @property
    def _units(self) -> Units:
        mask = Dropout(self.dropout_p, self.seed) if self.dropout_p else None
        return Units(self.activation, self.scale_tensor, mask)

    def _in_one_pass(self, start, z, out=None) -> torch.Tensor | None:
        """`start` plus the branch, in `out` where it is given; None where no pass serves."""
        return adapter_passes.bottleneck_forward(
            start, z, self.up, self.bias_up, self._units, self.scale, out
        )

    def _term(self, z: torch.Tensor) -> LowRank:
        """h, U and the bias, as a column of U that a unit of ones meets."""
        if self.bias_up is None:
            return LowRank(self._units.forward(z, False), self.up, self.scale)
        wide = accumulator(z.dtype)
        bias = self.bias_up.to(wide)
        if self.scale_tensor is not None:
            bias = bias * self.scale_tensor.to(wide)
        up = torch.cat((self.up.to(wide), bias.unsqueeze(1)), 1)
        return LowRank(self._units.forward(z, True), up, self.scale)
