"""`lora_linear_group` in Triton: which launches, in which order.

With n members, their A's stacked (one copy): one shrink, then n base products, each with the
low-rank term of its own columns of S in its accumulator. For products in 8 bits x is rounded once.

Backward: each dY is read once for its dS and dB; the dS, scaled, stand side by side in one matrix,
which gives all dA from one read of x; dX is the first base product with the whole low-rank term in
its accumulator, and the others are added to it by their own products. The mask is drawn once for
dA and once for dX.
"""

from typing import NamedTuple

import torch

from ...core import device
from ...core.groups import Common
from ..bases import held_member
from ..low_rank.arguments import Dropout, Scale
from ..low_rank.steps import expand_gradients, shrunk, sum_over_rows
from ..packed.steps import Packed, add_product, expanded, rounded_once


def forward(
    x: torch.Tensor,  # [M, in]
    members: list[NamedTuple],  # of group.Member
    common: Common,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return every y [M, out] in x's dtype and, in a list, all s [M, Σ ranks] in fp32."""
    chip = device.chip(x.device)
    a = torch.cat([member.lora_a for member in members])
    s, _ = shrunk(x, a, chip, dropout=Dropout(common.dropout_p, common.seed))
    bases = [_base(member, common, index) for index, member in enumerate(members)]
    rounded, ys = rounded_once(x, bases, chip), []
    for index, (member, part) in enumerate(zip(members, s.split(_ranks(members), 1), strict=True)):
        y = expanded(
            x, bases[index], part, member.lora_b, chip, vendor=_vendor(common, index),
            bias=member.bias, scale=Scale(common.scales[index], member.scale_tensor),
            rounded=rounded,
        )  # fmt: skip
        ys.append(y)
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
    (s,), chip = kept, device.chip(kept[0].device)
    reached = [index for index, dy in enumerate(dys) if dy is not None]
    ranks = _ranks([members[index] for index in reached])
    gradients = [type(member)(*(None,) * len(member)) for member in members]
    ds, s_of = s.new_empty(s.shape[0], sum(ranks)), s.split(_ranks(members), 1)
    goes_on = needs_x or any(needs[index].lora_a for index in reached)
    for index, part in zip(reached, ds.split(ranks, 1), strict=True):
        gradients[index] = _through_b(
            dys[index], members[index], s_of[index], part if goes_on else None,
            common.scales[index], needs[index], chip,
        )  # fmt: skip
    _through_a(x, ds, members, reached, needs, gradients, common, chip)
    dx = _input_gradient(dys, ds, members, reached, common, chip) if needs_x else None
    return dx, gradients


def _through_b(dy, member, s, ds, scale, need, chip) -> NamedTuple:
    """The member's gradients but for dA; its dS [M, rank], scaled, is written to `ds`."""
    sigma = Scale(scale, member.scale_tensor)
    found = expand_gradients(
        dy, member.lora_b, s, chip, hidden=None, scale=sigma, wants_hidden=ds is not None,
        wants_b=need.lora_b, wants_dot=need.scale_tensor, wants_columns=need.bias,
        into=None if ds is None else (ds, sigma),
    )  # fmt: skip
    dscale = sigma.gradient(found.dot) if need.scale_tensor else None
    return type(member)(*(None,) * len(member))._replace(
        lora_b=found.b if need.lora_b else None,
        scale_tensor=dscale,
        bias=found.columns.to(dy.dtype) if need.bias else None,
    )


def _through_a(x, ds, members, reached, needs, gradients, common, chip) -> None:
    """Add each dA to the gradients of the reached, where one is needed."""
    if not any(needs[index].lora_a for index in reached):
        return
    factors = [members[index].lora_a for index in reached]
    dtypes = {a.dtype for a in factors}
    da = x.new_empty(
        ds.shape[1], x.shape[1], dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32
    )
    sum_over_rows(x, ds, da, chip, dropout=Dropout(common.dropout_p, common.seed))
    for index, part in zip(reached, da.split([len(a) for a in factors]), strict=True):
        if needs[index].lora_a:
            da_i = part.to(members[index].lora_a.dtype)
            gradients[index] = gradients[index]._replace(lora_a=da_i)


def _input_gradient(dys, ds, members, reached, common, chip) -> torch.Tensor:
    """`Σ dY_i W_i + mask·(dS A)/keep` [M, in]."""
    a = torch.cat([members[index].lora_a for index in reached])
    first, *others = reached
    dx = expanded(
        dys[first], _base(members[first], common, first).t(), ds, a.t(), chip,
        vendor=_vendor(common, first), dropout=Dropout(common.dropout_p, common.seed),
    )  # fmt: skip
    for index in others:
        add_product(dys[index], _base(members[index], common, index).t(), dx, chip)
    return dx


def _ranks(members: list[NamedTuple]) -> list[int]:
    return [member.lora_a.shape[0] for member in members]


def _base(member: NamedTuple, common: Common, index: int) -> torch.Tensor | Packed:
    return held_member("triton", member, common.strategies[index])


def _vendor(common: Common, index: int) -> bool:
    return common.strategies[index].startswith("vendor")
