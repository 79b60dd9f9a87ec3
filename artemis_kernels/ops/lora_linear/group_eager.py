"""`lora_linear_group` in plain torch calls: the formulas of `eager.py`, x̃ read once for all.

With the A's stacked, `S = x̃ A_allᵀ` is one thin product, and in the backward
`dA_all = dS_allᵀ x̃` and `dX = Σ dY_i W_i + mask·(dS_all A_all)/keep` are one each.
"""

from typing import NamedTuple

import torch

from ...core.dropped import Dropout, add_dropped_product_, outer_dropped, project_dropped
from ...core.groups import Common
from ..bases import held_member
from ..rounding import rounded_for_int8
from .eager import expand_gradients, expanded


def forward(
    x: torch.Tensor,  # [M, in]
    members: list[NamedTuple],  # of group.Member
    common: Common,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return every y [M, out] and, in a list, all s [M, Σ ranks]; of x's dtype."""
    a = torch.cat([member.lora_a for member in members])
    s = project_dropped(x, a, _mask(common)).contiguous()
    rounded, ys = rounded_for_int8(x, common.strategies), []
    parts = s.split([member.lora_a.shape[0] for member in members], 1)
    for member, part, scale, strategy in zip(
        members, parts, common.scales, common.strategies, strict=True
    ):
        term = expanded(part, member.lora_b, scale, member.scale_tensor)
        ys.append(held_member("eager", member, strategy).product(x, member.bias, rounded, term))
    return ys, [s]


def backward(
    dys: list[torch.Tensor | None],  # [M, out]; None: the output was not used
    x: torch.Tensor | None,  # [M, in]; None unless an A needs a gradient
    members: list[NamedTuple],
    kept: list[torch.Tensor],
    common: Common,
    needs_x: bool,
    needs: list[NamedTuple],  # of bool
) -> tuple[torch.Tensor | None, list[NamedTuple]]:
    """Return dX and the members' gradients, None where not needed."""
    dx, gradients, ranks = None, [], [member.lora_a.shape[0] for member in members]
    reached = [i for i, dy in enumerate(dys) if dy is not None and (needs_x or needs[i].lora_a)]
    sizes = [ranks[i] for i in reached]
    ds = kept[0].new_empty(kept[0].shape[0], sum(sizes))
    ds_of = dict(zip(reached, ds.split(sizes, 1), strict=True)) if reached else {}
    s_of = kept[0].split(ranks, 1)
    for i, (dy, member, need) in enumerate(zip(dys, members, needs, strict=True)):
        db = dscale = dbias = None
        if dy is not None:
            _, db, dscale, dbias = expand_gradients(
                dy, s_of[i], member.lora_b, common.scales[i], member.scale_tensor,
                (i in ds_of, need.lora_b, need.scale_tensor, need.bias), ds_of.get(i),
            )  # fmt: skip
            if needs_x:
                dx = held_member("eager", member, common.strategies[i]).input_gradient(dy, dx)
        none = type(member)(*(None,) * len(member))
        gradients.append(none._replace(lora_b=db, scale_tensor=dscale, bias=dbias))
    if reached:
        _through_a(dx, x, members, reached, ds, gradients, _mask(common), needs)
    return dx, gradients


def _through_a(dx, x, members, reached, ds, gradients, mask, needs) -> None:
    """Add the low-rank term to dx, where there is one, and dA to the gradients of the reached."""
    if dx is not None:
        a = torch.cat([members[i].lora_a for i in reached])
        add_dropped_product_(dx, ds, a, mask)
    if any(needs[i].lora_a for i in reached):
        da = outer_dropped(ds, x, mask).split([members[i].lora_a.shape[0] for i in reached])
        for i, part in zip(reached, da, strict=True):
            if needs[i].lora_a:
                da_i = part.to(members[i].lora_a.dtype, copy=True)  # its storage is its own
                gradients[i] = gradients[i]._replace(lora_a=da_i)


def _mask(common: Common) -> Dropout | None:
    return Dropout(common.dropout_p, common.seed) if common.dropout_p else None
