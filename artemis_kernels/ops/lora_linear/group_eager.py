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
    dx, reached, ds_parts, gradients = None, [], [], []
    parts = kept[0].split([member.lora_a.shape[0] for member in members], 1)
    for index, (dy, member, s, need) in enumerate(zip(dys, members, parts, needs, strict=True)):
        ds = db = dscale = dbias = None
        if dy is not None:
            ds, db, dscale, dbias = expand_gradients(
                dy, s, member.lora_b, common.scales[index], member.scale_tensor,
                (needs_x or need.lora_a, need.lora_b, need.scale_tensor, need.bias),
            )  # fmt: skip
            if needs_x:
                dx = held_member("eager", member, common.strategies[index]).input_gradient(dy, dx)
            if ds is not None:
                reached.append(index)
                ds_parts.append(ds)
        none = type(member)(*(None,) * len(member))
        gradients.append(none._replace(lora_b=db, scale_tensor=dscale, bias=dbias))
    if reached:
        _through_a(dx, x, members, reached, ds_parts, gradients, _mask(common), needs)
    return dx, gradients


def _through_a(dx, x, members, reached, ds_parts, gradients, mask, needs) -> None:
    """Add the low-rank term to dx, where there is one, and dA to the gradients of the reached."""
    ds = torch.cat(ds_parts, 1)
    if dx is not None:
        a = torch.cat([members[index].lora_a for index in reached])
        add_dropped_product_(dx, ds, a, mask)
    if any(needs[index].lora_a for index in reached):
        da = outer_dropped(ds, x, mask).split([part.shape[1] for part in ds_parts])
        for index, part in zip(reached, da, strict=True):
            if needs[index].lora_a:
                da_i = part.to(members[index].lora_a.dtype, copy=True)  # its storage is its own
                gradients[index] = gradients[index]._replace(lora_a=da_i)


def _mask(common: Common) -> Dropout | None:
    return Dropout(common.dropout_p, common.seed) if common.dropout_p else None
