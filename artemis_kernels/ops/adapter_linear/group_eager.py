"""`adapter_linear`, of one member or several, in plain torch calls: the fast CPU path.

Two strategies, the same function (docs/adapter_linear.md):

`plain`   the bottleneck reads y0 = x Wᵀ + bias, which is kept for dD; x is not.
`folded`  the down-projection is folded through the base, F = D W and c = D bias + b_d, so that
          z = x Fᵀ + c and y0 is neither kept nor read: dD = (dzᵀ x) Wᵀ + (Σ dz) biasᵀ and
          dX = dY W + dz F.

With the F of all folded members in one matrix, row under row, and their z and dz side by side,
`x Fᵀ`, `dzᵀ x` and `dz F` are one product each. x is rounded once, dX is summed in one buffer.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ...core.base import Base
from ...core.groups import Common
from ...core.products import LowRank, column_sum, outer_gradient, project
from ..bases import held_member
from ..bottleneck_adapter.branch import Branch, BranchGradients
from ..rounding import rounded_for_int8
from .folding import by_kind, folded_biases, rows_of, widths


def forward(
    x: torch.Tensor,  # [M, in]
    members: Sequence[NamedTuple],  # of group.Member
    common: Common,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return every y [M, out] in x's dtype, and what the backward needs.

    That is all z [M, Σ widths] and all F [Σ widths, in] of the folded members, where there are any,
    then z and y0 of each plain one; all of x's dtype.
    """
    return forward_over(_base_of(members, common), x, members, common)


def forward_over(
    base_of: Callable[[int], Base],
    x: torch.Tensor,
    members: Sequence[NamedTuple],
    common: Common,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """`forward` of members that need no more than a bottleneck's tensors.

    One base at a time: it may hold a copy of a packed weight.
    """
    branches, (folded, plain) = _branches(members, common), by_kind(common.strategies)
    sizes, rounded = widths(members, folded), rounded_for_int8(x, common.strategies)
    f = x.new_empty(sum(sizes), x.shape[1])
    f_of = dict(zip(folded, f.split(sizes), strict=True)) if folded else {}
    ys, kept = [], []
    for i, member in enumerate(members):
        base = base_of(i)
        ys.append(base.product(x, member.bias, rounded))
        if i in f_of:
            base.fold(member.down, f_of[i])
    if folded:
        z = project(x, f, folded_biases(members, folded)).contiguous()
        for i, part in zip(folded, z.split(sizes, 1), strict=True):
            branches[i].add_(ys[i], part)
        kept += [z, f]
    for i in plain:
        y0 = ys[i]
        z = project(y0, members[i].down, members[i].bias_down).contiguous()
        ys[i] = branches[i].added(y0, z)
        kept += [z, y0]
    return ys, kept


def backward(
    dys: Sequence[torch.Tensor | None],  # [M, out]; None: the output was not used
    x: torch.Tensor | None,  # [M, in]; None unless a folded `down` needs a gradient
    members: Sequence[NamedTuple],
    kept: Sequence[torch.Tensor | None],  # as forward returned it
    common: Common,
    needs_x: bool,
    needs: Sequence[NamedTuple],  # of bool
) -> tuple[torch.Tensor | None, list[NamedTuple]]:
    """Return dX and the members' gradients, None where not needed."""
    base_of = _base_of(members, common)
    return backward_over(base_of, dys, x, members, kept, common, needs_x, needs)


def backward_over(
    base_of: Callable[[int], Base], dys, x, members, kept, common: Common, needs_x: bool, needs
) -> tuple[torch.Tensor | None, list[NamedTuple]]:
    """`backward` of the members of `forward_over`."""
    branches, (folded, plain) = _branches(members, common), by_kind(common.strategies)
    dx, gradients = None, [type(member)(*(None,) * len(member)) for member in members]
    reached = [i for i in folded if dys[i] is not None and (needs_x or any(needs[i]))]
    if reached:
        sizes = widths(members, reached)
        z_of = dict(zip(folded, kept[0].split(widths(members, folded), 1), strict=True))
        dz = kept[0].new_empty(kept[0].shape[0], sum(sizes))
        found = {
            i: branches[i].backward(dys[i], z_of[i], needs[i], part)
            for i, part in zip(reached, dz.split(sizes, 1), strict=True)
        }
        through, term = [None] * len(reached), None
        if any(needs[i].down for i in reached):
            through = outer_gradient(dz, x).split(sizes)
        if needs_x:
            term = LowRank(dz, rows_of(kept[1], members, folded, reached).t())
        for i, df in zip(reached, through, strict=True):
            base, ddown = base_of(i), None
            if needs[i].down:
                ddown = base.unfolded(df, dys[i].dtype)
            if needs[i].down and members[i].bias is not None:
                bias = members[i].bias.to(ddown.dtype)
                ddown.addr_(found[i].dz_sum.to(ddown.dtype), bias)
            gradients[i] = _of_member(members[i], dys[i], found[i], ddown, needs[i])
            if needs_x:
                dx = base.input_gradient(dys[i], dx, term if i == reached[-1] else None)
    for place, i in enumerate(plain):
        if dys[i] is None or not (needs_x or any(needs[i])):
            continue
        z, y0 = kept[2 * bool(folded) + 2 * place :][:2]
        found = branches[i].backward(dys[i], z, needs[i])
        if needs_x:
            dy0 = LowRank(found.dz, members[i].down.t()).plus(dys[i])
            dx = base_of(i).input_gradient(dy0, dx)
        ddown = outer_gradient(found.dz, y0) if needs[i].down else None
        gradients[i] = _of_member(members[i], dys[i], found, ddown, needs[i])
    return dx, gradients


def _of_member(
    member: NamedTuple,
    dy: torch.Tensor,
    found: BranchGradients,
    ddown: torch.Tensor | None,
    need: NamedTuple,
) -> NamedTuple:
    """A member's gradients; dX is no part of them."""
    bias = None
    if need.bias:
        through = torch.mv(member.down.t().to(found.dz_sum.dtype), found.dz_sum)
        bias = (column_sum(dy) + through).to(member.bias.dtype)
    none = type(member)(*(None,) * len(member))
    return none._replace(
        down=None if ddown is None else ddown.to(member.down.dtype),
        up=found.dup,
        bias=bias,
        bias_down=found.dz_sum.to(member.bias_down.dtype) if need.bias_down else None,
        bias_up=found.dbias_up,
        scale_tensor=found.dscale,
    )


def _base_of(members: Sequence[NamedTuple], common: Common) -> Callable[[int], Base]:
    return lambda i: held_member("eager", members[i], common.strategies[i])


def _branches(members: Sequence[NamedTuple], common: Common) -> list[Branch]:
    return [
        Branch(member.up, member.bias_up, scale, member.scale_tensor, common.activation,
               common.dropout_p, common.seed)
        for member, scale in zip(members, common.scales, strict=True)
    ]  # fmt: skip
