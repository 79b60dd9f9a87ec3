"""`lora_linear_group` in Triton: which launches, in which order.

With n members, their A's stacked (one copy) and S cut into one block for each (a copy of M·rank
numbers): one shrink, then n base products with the low-rank term in their accumulators.

Backward: each dY is read once for its dS and dB; the dS, scaled, side by side, give all dA from
one read of x; dX is the first base product with the whole low-rank term in its accumulator, and
the vendor's products of the others, added to it. The mask is drawn once for dA and once for dX.
"""

from typing import NamedTuple

import torch

from ...core import device
from ...core.groups import Common
from ..bases import held
from ..low_rank.arguments import Dropout, Scale
from ..low_rank.steps import expand_gradients, shrunk, sum_over_rows
from ..packed.steps import Packed, expanded, product


@device.launches_on_first_argument
def forward(
    x: torch.Tensor,  # [M, in]
    members: list[NamedTuple],  # of group.Member
    common: Common,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return every y [M, out] in x's dtype and, in a list, all s [M, Σ ranks] in fp32."""
    chip = device.chip(x.device)
    a = torch.cat([member.lora_a for member in members])
    s, _ = shrunk(x, a, chip, dropout=Dropout(common.dropout_p, common.seed))
    ys = []
    for index, (member, part) in enumerate(zip(members, _parts(s, members), strict=True)):
        y = expanded(
            x, _base(member, common, index), part, member.lora_b, chip,
            vendor=_vendor(common, index), bias=member.bias,
            scale=Scale(common.scales[index], member.scale_tensor),
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
    with torch.cuda.device_of(kept[0]):
        chip = device.chip(kept[0].device)
        reached = [index for index, dy in enumerate(dys) if dy is not None]
        parts = _parts(kept[0], members)
        gradients = [type(member)(*(None,) * len(member)) for member in members]
        hidden = []
        for index in reached:
            ds, gradients[index] = _through_b(
                dys[index], members[index], parts[index], common.scales[index], needs_x,
                needs[index], chip,
            )  # fmt: skip
            hidden.append(ds)
        if not needs_x and not any(needs[index].lora_a for index in reached):
            return None, gradients
        ds = torch.cat(hidden, 1)
        _through_a(x, ds, members, reached, needs, gradients, common, chip)
        dx = _input_gradient(dys, ds, members, reached, common, chip) if needs_x else None
        return dx, gradients


def _through_b(dy, member, s, scale, needs_x, need, chip) -> tuple[torch.Tensor | None, NamedTuple]:
    """The member's dS [M, rank], scaled, in fp32, and its gradients but for dA."""
    sigma = Scale(scale, member.scale_tensor)
    found = expand_gradients(
        dy, member.lora_b, s, chip, hidden=None, scale=sigma,
        wants_hidden=True, wants_b=need.lora_b, wants_dot=need.scale_tensor,
        wants_columns=need.bias,
    )  # fmt: skip
    dscale = (found.dot * scale).to(member.scale_tensor.dtype) if need.scale_tensor else None
    gradients = type(member)(*(None,) * len(member))._replace(
        lora_b=found.b if need.lora_b else None,
        scale_tensor=dscale,
        bias=found.columns.to(dy.dtype) if need.bias else None,
    )
    return sigma.of(found.hidden), gradients


def _through_a(x, ds, members, reached, needs, gradients, common, chip) -> None:
    """Add each dA to the gradients of the reached, where one is needed."""
    if not any(needs[index].lora_a for index in reached):
        return
    da = x.new_empty(ds.shape[1], x.shape[1], dtype=torch.float32)
    sum_over_rows(x, ds, da, chip, dropout=Dropout(common.dropout_p, common.seed))
    ranks = [members[index].lora_a.shape[0] for index in reached]
    for index, part in zip(reached, da.split(ranks), strict=True):
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
        weight = _base(members[index], common, index)
        if isinstance(weight, Packed):
            dx += product(dys[index], weight.t(), None, chip)
        else:
            dx.addmm_(dys[index], weight)
    return dx


def _parts(s: torch.Tensor, members: list[NamedTuple]) -> list[torch.Tensor]:
    """S cut by member, contiguous as the kernels read it."""
    parts = s.split([member.lora_a.shape[0] for member in members], 1)
    return [part.contiguous() for part in parts]


def _base(member: NamedTuple, common: Common, index: int) -> torch.Tensor | Packed:
    strategy = common.strategies[index]
    return held("triton", member.weight, member.weight_scale, member.weight_offset, strategy)


def _vendor(common: Common, index: int) -> bool:
    return common.strategies[index].startswith("vendor")
