"""`adapter_linear_group` in plain torch calls: `eager.py` for each, x rounded once, dX summed."""

from typing import NamedTuple

import torch

from ...core.groups import Common
from ..bases import held_member
from ..rounding import rounded_for_int8
from . import eager


def forward(
    x: torch.Tensor,  # [M, in]
    members: list[NamedTuple],  # of group.Member
    common: Common,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return every y [M, out], and every z followed by every F (folded) or y0 (plain)."""
    rounded = rounded_for_int8(x, common.strategies)
    results = [
        eager.forward(
            x, held_member("eager", member, strategy), member.down, member.up, member.bias,
            member.bias_down, member.bias_up, scale, member.scale_tensor, common.activation,
            common.dropout_p, common.seed, strategy, rounded,
        )
        for member, scale, strategy in zip(members, common.scales, common.strategies, strict=True)
    ]  # fmt: skip
    ys, zs, of_down = zip(*results, strict=True)
    return list(ys), [*(z.contiguous() for z in zs), *of_down]


def backward(
    dys: list[torch.Tensor | None],  # [M, out]; None: the output was not used
    x: torch.Tensor | None,  # [M, in]; None unless a folded `down` needs a gradient
    members: list[NamedTuple],
    kept: list[torch.Tensor | None],
    common: Common,
    needs_x: bool,
    needs: list[NamedTuple],  # of bool
) -> tuple[torch.Tensor | None, list[NamedTuple]]:
    """Return dX and the members' gradients, None where not needed."""
    dx, gradients = None, []
    for index, (dy, member, need) in enumerate(zip(dys, members, needs, strict=True)):
        found = type(member)(*(None,) * len(member))
        if dy is not None:
            strategy = common.strategies[index]
            dx_i, ddown, dup, dscale, dbias, dbias_down, dbias_up = eager.backward(
                dy, x, held_member("eager", member, strategy), member.down, member.up, member.bias,
                member.bias_down, member.bias_up, kept[index], kept[len(members) + index],
                common.scales[index], member.scale_tensor, common.activation, common.dropout_p,
                common.seed, strategy,
                (needs_x, need.down, need.up, need.scale_tensor, need.bias, need.bias_down,
                 need.bias_up),
                into=dx,
            )  # fmt: skip
            dx = dx_i if needs_x else None
            found = found._replace(
                down=ddown, up=dup, scale_tensor=dscale, bias=dbias, bias_down=dbias_down,
                bias_up=dbias_up,
            )  # fmt: skip
        gradients.append(found)
    return dx, gradients
