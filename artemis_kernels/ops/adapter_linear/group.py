"""`adapter_linear_group`: several `adapter_linear` of one x (gate and up) as one operation."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...core import call
from ...core.device import Chip
from ...core.groups import Common, GroupOperation, define_group
from ...core.quantized import QuantizedWeight
from ...core.tiling import Shape
from ...core.types import Choice, Factor, Scale
from .. import members
from ..members import why_apart
from . import group_eager, op
from .folding import by_kind, widths

NAME = "adapter_linear_group"


def adapter_linear_group(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor | QuantizedWeight],
    downs: Sequence[torch.Tensor],
    ups: Sequence[torch.Tensor],
    *,
    biases: Sequence[torch.Tensor | None] | None = None,
    biases_down: Sequence[torch.Tensor | None] | None = None,
    biases_up: Sequence[torch.Tensor | None] | None = None,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    scales: Sequence[Factor] | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return `adapter_linear(x, weights[i], downs[i], ups[i], ...)` of every i.

    The kernels read x once for all folded bottlenecks, in either direction; on all paths x is
    rounded to 8 bits once where weights are multiplied so, and dX is summed in one buffer. The
    values are those of the single calls with this very seed, up to rounding; an output that no
    gradient reaches costs nothing in the backward.

    Args:
        x: [..., in], floating, as in `adapter_linear`.
        weights: each [out_i, in], or a `QuantizedWeight` of that shape.
        downs: each [width_i, out_i].
        ups: each [out_i, width_i].
        biases, biases_down, biases_up: each a tensor or None; None for none at all.
        activation, dropout_p, seed, impl: as in `adapter_linear`, the same for all.
        scales: each a float, a 0-d tensor or a pair of these; None for ones.

    Returns:
        A tuple of [..., out_i].

    Raises:
        ValueError, TypeError: lists of different lengths, an empty group, or what a member's own
            call would refuse, naming the member.
        Unavailable: a path asked for by `impl` that cannot run, saying why.
    """
    calls = _calls(
        x, weights, downs, ups, biases, biases_down, biases_up, activation, dropout_p, seed, scales,
        impl,
    )  # fmt: skip
    each = members.paths(NAME, op.plan, calls)
    p, seed = call.dropout(dropout_p, seed, x)
    if why_apart(each) is not None:
        return tuple(
            op.adapter_linear(*arguments, **options | {"seed": seed})
            for arguments, options in calls
        )
    dtype = call.compute_dtype(x)
    parts, numbers = _operands(calls, dtype)
    x = x.to(dtype)
    with call.outside_autocast(x):
        ys = _operator(
            x.reshape(-1, x.shape[-1]), parts, numbers, activation, p, seed, each[0].impl,
            [path.strategy for path in each],
        )  # fmt: skip
    outer = x.shape[:-1]
    return tuple(y.reshape(*outer, y.shape[-1]) for y in ys)


def _operands(calls: list[tuple], dtype: torch.dtype) -> tuple[list, list[float]]:
    """The operator's tensors, flat, and the members' numeric scales."""
    parts, numbers = [], []
    for (_, weight, down, up), options in calls:
        bias, scale = options["bias"], Scale.of(options["scale"])
        data, quantizers = call.weight_tensors(weight, dtype)
        bias = None if bias is None else bias.to(dtype)
        member = Member(data, down, up, bias, options["bias_down"], options["bias_up"],
                        scale.tensor, *quantizers)  # fmt: skip
        parts += list(member)  # torch 2.11 compiles no `+=` of a named tuple
        numbers.append(scale.number)
    return parts, numbers


def explain(
    x, weights, downs, ups, *, biases=None, biases_down=None, biases_up=None, activation="gelu",
    dropout_p=0.0, seed=None, scales=None, impl=None,
) -> Choice:  # fmt: skip
    """The path `adapter_linear_group` takes for these arguments, why, and what it costs."""
    calls = _calls(
        x, weights, downs, ups, biases, biases_down, biases_up, activation, dropout_p, seed, scales,
        impl,
    )  # fmt: skip
    each = members.paths(NAME, op.plan, calls)
    costs = [op.explain(*arguments, **options).cost for arguments, options in calls]
    outputs = members.outputs_of(x, ups)
    read_once = max(1, len(_folded(each, outputs))) if each[0].impl == "triton" else len(calls)
    shared, what = members.joined(x, read_once), what_joins(each, outputs, x.device)
    return members.choice(NAME, each, why_apart(each), costs, shared, what)


def what_joins(each: list[call.Path], outputs: Sequence[Shape], place: torch.device | Chip) -> str:
    """What joining members on these paths comes down to."""
    if each[0].impl != "triton":
        return members.READ_ONCE
    folded = _folded(each, outputs)
    if len(folded) < 2:
        return "dX is summed in one buffer, and fewer than two bottlenecks are folded to share x"
    return members.told(*zip(*folded, strict=True), place)


def _folded(each: list[call.Path], outputs: Sequence[Shape]) -> list[tuple[str, Shape]]:
    """Strategies and outputs of the folded members."""
    pairs = zip((path.strategy for path in each), outputs, strict=True)
    return [(strategy, shape) for strategy, shape in pairs if strategy.startswith("folded")]


def _calls(
    x, weights, downs, ups, biases, biases_down, biases_up, activation, dropout_p, seed, scales,
    impl,
) -> list[tuple]:  # fmt: skip
    """Arguments and options of each member's own `adapter_linear`."""
    each = members.by_member(
        NAME, len(weights), weights=weights, downs=downs, ups=ups, biases=biases,
        biases_down=biases_down, biases_up=biases_up,
        scales=(1.0,) * len(weights) if scales is None else scales,
    )  # fmt: skip
    shared = {"activation": activation, "dropout_p": dropout_p, "seed": seed, "impl": impl}
    return [
        (
            (x, weight, down, up),
            {"bias": bias, "bias_down": bias_down, "bias_up": bias_up, "scale": scale, **shared},
        )
        for weight, down, up, bias, bias_down, bias_up, scale in each
    ]


class Member(NamedTuple):
    """The tensors of one member, in the operator's order."""

    weight: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None
    bias_down: torch.Tensor | None
    bias_up: torch.Tensor | None
    scale_tensor: torch.Tensor | None
    weight_scale: torch.Tensor | None = None
    weight_offset: torch.Tensor | None = None


@functools.cache
def _path(impl: str):
    if impl == "eager":
        return group_eager
    from . import group_fused  # imports triton

    return group_fused


def _fake(x: torch.Tensor, parts: list[Member], common: Common):
    """Every y; and what is kept: all z and all F of the folded, z and y0 of each plain member."""
    z_dtype = x.dtype if common.impl == "eager" else torch.float32
    ys = [x.new_empty(x.shape[0], member.weight.shape[0]) for member in parts]
    kept, (folded, plain) = [], by_kind(common.strategies)
    if folded:
        width = sum(widths(parts, folded))
        kept += [x.new_empty(x.shape[0], width, dtype=z_dtype), x.new_empty(width, x.shape[1])]
    for i in plain:
        width = parts[i].down.shape[0]
        kept += [x.new_empty(x.shape[0], width, dtype=z_dtype), torch.empty_like(ys[i])]
    return ys, kept


def _reads_x(needs: list[Member], common: Common) -> bool:
    """Folded, dD is a sum over x."""
    return any(needs[i].down for i in by_kind(common.strategies)[0])


def _to_keep(kept: list[torch.Tensor], needs: list[Member], common: Common):
    """All z; F for dX and dD; y0, of plain members, for dD only."""
    folded, plain = by_kind(common.strategies)
    for place, i in enumerate(plain):
        if not needs[i].down:
            kept[2 * bool(folded) + 2 * place + 1] = None
    return kept


_operator = define_group(GroupOperation(NAME, Member, _path, _fake, _reads_x, _to_keep))
