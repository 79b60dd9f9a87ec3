"""`adapter_linear_group` in Triton: which launches, in which order.

The folded members' F_i = D_i W_i are formed in one matrix, row under row: one shrink of x gives all
z and h side by side, then each base product takes its own columns of h in its epilogue. A member's
mask is that of its single call. Plain members run alone.

Backward of the folded: each dY is read once for its dz and dU; the dz, scaled, stand side by side
in one matrix, which gives `dzᵀ x` of all from one read of x; dX is the first base product with the
whole low-rank term in its accumulator. All other members, plain ones too, are added to it by their
own products. For products in 8 bits x is rounded once.
"""

from typing import NamedTuple

import torch

from ...core import device
from ...core.groups import Common
from ...core.products import sums_dtype, through_weight
from ..bases import held_member
from ..low_rank.arguments import Dropout, Scale
from ..low_rank.steps import (
    Hidden,
    expand_gradients,
    like,
    shrunk,
    small_gradients,
    sum_over_rows,
)
from ..packed.steps import Packed, add_product, dense, expanded, product, rounded_once
from . import fused
from .folding import by_kind, folded_biases, rows_of, widths


def forward(
    x: torch.Tensor,  # [M, in]
    members: list[NamedTuple],  # of group.Member
    common: Common,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return every y [M, out] in x's dtype, and what the backward needs.

    That is all z [M, Σ widths] in fp32 and all F [Σ widths, in] of the folded members, where there
    are any, then z and y0 of each plain one.
    """
    chip = device.chip(x.device)
    folded, plain = by_kind(common.strategies)
    bases = _bases(members, common)
    rounded = rounded_once(x, bases, chip)
    ys, kept = dict[int, torch.Tensor](), []
    if folded:
        z, h, f = _hidden(x, bases, members, folded, common, chip)
        for i, part in zip(folded, h.split(widths(members, folded), 1), strict=True):
            ys[i] = expanded(
                x, bases[i], part, members[i].up, chip,
                vendor="vendor" in common.strategies[i], bias=members[i].bias,
                bias_low=members[i].bias_up, scale=_scale(members, common, i), rounded=rounded,
            )  # fmt: skip
        kept += [z, f]
    for i in plain:
        member = members[i]
        ys[i], z, y0 = fused.forward(
            x, bases[i], member.down, member.up, member.bias, member.bias_down, member.bias_up,
            common.scales[i], member.scale_tensor, common.activation, common.dropout_p,
            common.seed, common.strategies[i], rounded,
        )  # fmt: skip
        kept += [z, y0]
    return [ys[i] for i in range(len(members))], kept


def backward(
    dys: list[torch.Tensor | None],  # [M, out]; None: the output was not used
    x: torch.Tensor | None,  # [M, in]; None unless a folded `down` needs a gradient
    members: list[NamedTuple],
    kept: list[torch.Tensor | None],  # as forward returned it
    common: Common,
    needs_x: bool,
    needs: list[NamedTuple],  # of bool
) -> tuple[torch.Tensor | None, list[NamedTuple]]:
    """Return dX and the members' gradients, None where not needed."""
    folded, plain = by_kind(common.strategies)
    gradients = [type(member)(*(None,) * len(member)) for member in members]
    chip, bases, dx = device.chip(kept[0].device), _bases(members, common), None
    reached = [i for i in folded if dys[i] is not None]
    if reached:
        f = rows_of(kept[1], members, folded, reached) if needs_x else None
        dz = _folded_gradients(
            dys, x, bases, members, kept[0], folded, common, needs_x, needs, gradients, chip
        )
        if needs_x:
            dx = _input_gradient(dys, dz, f, bases, reached, common, chip)
    for place, i in enumerate(plain):
        if dys[i] is not None:
            z, y0 = kept[2 * bool(folded) + 2 * place :][:2]
            dy0 = _plain_gradients(
                dys[i], members, i, z, y0, common, needs_x, needs, gradients, chip
            )
            if needs_x and dx is None:
                dx = product(dy0, bases[i].t(), None, chip)
            elif needs_x:
                add_product(dy0, bases[i].t(), dx, chip)
    return dx, gradients


def _hidden(
    x, bases, members, folded, common, chip
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All z and h [M, Σ widths] and all F [Σ widths, in] of the folded members."""
    sizes = widths(members, folded)
    f = x.new_empty(sum(sizes), x.shape[1])
    for i, part in zip(folded, f.split(sizes), strict=True):
        torch.mm(members[i].down.to(x.dtype), dense(bases[i], x.dtype, chip), out=part)
    z, h = shrunk(
        x, f, chip, stage="forward", bias=folded_biases(members, folded), with_h=True,
        activation=common.activation, dropout=Dropout(common.dropout_p, common.seed),
        widths=tuple(sizes) if len(sizes) > 1 else None,
    )  # fmt: skip
    return z, h, f


def _folded_gradients(
    dys, x, bases, members, z, folded, common, needs_x, needs, gradients, chip
) -> torch.Tensor:
    """The dz [M, Σ widths] of the reached, scaled; their gradients are added to `gradients`."""
    reached = [i for i in folded if dys[i] is not None]
    sizes, z_of = widths(members, reached), z.split(widths(members, folded), 1)
    dz = z.new_empty(z.shape[0], sum(sizes))
    wants_down = any(needs[i].down for i in reached)
    wants_sums = any(needs[i].down or needs[i].bias or needs[i].bias_down for i in reached)
    hidden = Hidden(common.activation, Dropout(common.dropout_p, common.seed))
    columns = {}
    for i, part in zip(reached, dz.split(sizes, 1), strict=True):
        member, need, sigma = members[i], needs[i], _scale(members, common, i)
        found = expand_gradients(
            dys[i], member.up, z_of[folded.index(i)], chip, hidden=hidden, scale=sigma,
            wants_hidden=needs_x or wants_sums, wants_b=need.up, wants_dot=need.scale_tensor,
            wants_columns=need.bias
            or (member.bias_up is not None and (need.scale_tensor or need.bias_up)),
            into=(part, sigma),
        )  # fmt: skip
        small = small_gradients(
            found, sigma, member.bias_up, need.scale_tensor, False, need.bias_up
        )
        columns[i] = found.columns
        gradients[i] = gradients[i]._replace(
            up=found.b if need.up else None,
            scale_tensor=small.scale,
            bias_up=like(small.bias_up, member.bias_up),
        )
    if wants_sums:
        sums = dz.sum(0).split(sizes)
        through = _through_x(x, dz, chip).split(sizes) if wants_down else [None] * len(reached)
        for i, total, g in zip(reached, sums, through, strict=True):
            base = dense(bases[i], x.dtype, chip) if needs[i].down else None
            found = _down_gradients(members[i], needs[i], g, total, columns[i], base)
            gradients[i] = gradients[i]._replace(**found)
    return dz


def _through_x(x: torch.Tensor, dz: torch.Tensor, chip: device.Chip) -> torch.Tensor:
    """`dzᵀ x` [Σ widths, in], as sums over x are handed on."""
    through = x.new_empty(dz.shape[1], x.shape[1], dtype=sums_dtype(x.dtype))
    sum_over_rows(x, dz, through, chip)
    return through


def _down_gradients(member, need, through, total, columns, base) -> dict[str, torch.Tensor | None]:
    """dD, dbias and dbias_down from the scaled `through` = dzᵀ x and `total` = Σ dz."""
    down = bias = None
    if need.down:
        down = through_weight(through, base).float()
        if member.bias is not None:
            down.addr_(total, member.bias.float())
    if need.bias:
        bias = columns + total @ member.down.float()
    return {
        "down": like(down, member.down),
        "bias": like(bias, member.bias),
        "bias_down": total.to(member.bias_down.dtype) if need.bias_down else None,
    }


def _input_gradient(dys, dz, f, bases, reached, common, chip) -> torch.Tensor:
    """`Σ dY_i W_i + dz F` [M, in] over the reached."""
    first, *others = reached
    dx = expanded(
        dys[first], bases[first].t(), dz, f.t(), chip,
        vendor="vendor" in common.strategies[first],
    )  # fmt: skip
    for i in others:
        add_product(dys[i], bases[i].t(), dx, chip)
    return dx


def _plain_gradients(
    dy, members, i, z, y0, common, needs_x, needs, gradients, chip
) -> torch.Tensor | None:
    """The gradient of a plain member's y0 [M, out]; the others are added to `gradients`."""
    member, need = members[i], needs[i]
    dy0, down, up, scale, bias, bias_down, bias_up = fused.plain_backward(
        dy, member.down, member.up, member.bias, member.bias_down, member.bias_up, z, y0,
        common.scales[i], member.scale_tensor, common.activation, common.dropout_p, common.seed,
        (needs_x, need.down, need.up, need.scale_tensor, need.bias, need.bias_down, need.bias_up),
        chip,
    )  # fmt: skip
    gradients[i] = gradients[i]._replace(
        down=down, up=up, scale_tensor=scale, bias=bias, bias_down=bias_down, bias_up=bias_up
    )
    return dy0


def _scale(members: list[NamedTuple], common: Common, i: int) -> Scale:
    return Scale(common.scales[i], members[i].scale_tensor)


def _bases(members: list[NamedTuple], common: Common) -> list[torch.Tensor | Packed]:
    pairs = zip(members, common.strategies, strict=True)
    return [held_member("triton", member, strategy) for member, strategy in pairs]
