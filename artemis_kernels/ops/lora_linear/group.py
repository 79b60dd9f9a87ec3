"""`lora_linear_group`: several `lora_linear` of one x (q, k and v) as one operation."""

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
from . import group_eager, op

NAME = "lora_linear_group"


def lora_linear_group(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor | QuantizedWeight],
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    scales: Sequence[Factor],
    *,
    biases: Sequence[torch.Tensor | None] | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return `lora_linear(x, weights[i], lora_a[i], lora_b[i], scales[i], ...)` of every i.

    x is read once for all low-rank terms, its dropout mask drawn once, and rounded to 8 bits once
    where weights are multiplied so; dX is summed in one buffer. The values are those of the single
    calls with this very seed, up to rounding; an output that no gradient reaches costs nothing in
    the backward.

    Args:
        x: [..., in], floating, as in `lora_linear`.
        weights: each [out_i, in], or a `QuantizedWeight` of that shape.
        lora_a: each [rank_i, in].
        lora_b: each [out_i, rank_i].
        scales: each a float, a 0-d tensor or a pair of these.
        biases: each [out_i] or None; None for no biases at all.
        dropout_p, seed, impl: as in `lora_linear`; one mask for all.

    Returns:
        A tuple of [..., out_i].

    Raises:
        ValueError, TypeError: lists of different lengths, an empty group, or what a member's own
            call would refuse, naming the member.
        Unavailable: a path asked for by `impl` that cannot run, saying why.
    """
    calls = _calls(x, weights, lora_a, lora_b, scales, biases, dropout_p, seed, impl)
    each = members.paths(NAME, op.plan, calls)
    p, seed = call.dropout(dropout_p, seed, x)
    if why_apart(each) is not None:
        return tuple(
            op.lora_linear(*arguments, **options | {"seed": seed}) for arguments, options in calls
        )
    dtype = call.compute_dtype(x)
    parts, numbers = _operands(calls, dtype)
    x = x.to(dtype)
    with call.outside_autocast(x):
        ys = _operator(
            x.reshape(-1, x.shape[-1]), parts, numbers, "", p, seed, each[0].impl,
            [path.strategy for path in each],
        )  # fmt: skip
    outer = x.shape[:-1]
    return tuple(y.reshape(*outer, y.shape[-1]) for y in ys)


def _operands(calls: list[tuple], dtype: torch.dtype) -> tuple[list, list[float]]:
    """The operator's tensors, flat, and the members' numeric scales."""
    parts, numbers = [], []
    for (_, weight, a, b, scale), options in calls:
        bias, scale = options["bias"], Scale.of(scale)
        data, quantizers = call.weight_tensors(weight, dtype)
        bias = None if bias is None else bias.to(dtype)
        parts += list(Member(data, a, b, bias, scale.tensor, *quantizers))  # a tuple: torch 2.11
        numbers.append(scale.number)
    return parts, numbers


def why_apart(each: list[call.Path]) -> str | None:
    """Why members on these paths are computed one after the other, or None where they join."""
    why = members.why_apart(each)
    if why is None and any(path.strategy == "one_pass" for path in each):
        return "one pass over x and W is all that a member takes"
    return why


def explain(
    x, weights, lora_a, lora_b, scales, *, biases=None, dropout_p=0.0, seed=None, impl=None
) -> Choice:
    """The path `lora_linear_group` takes for these arguments, why, and what it costs."""
    calls = _calls(x, weights, lora_a, lora_b, scales, biases, dropout_p, seed, impl)
    each = members.paths(NAME, op.plan, calls)
    costs = [op.explain(*arguments, **options).cost for arguments, options in calls]
    shared = members.joined(x, len(calls))
    what = what_joins(each, members.outputs_of(x, lora_b), x.device)
    return members.choice(NAME, each, why_apart(each), costs, shared, what)


def what_joins(each: list[call.Path], outputs: Sequence[Shape], place: torch.device | Chip) -> str:
    """What joining members on these paths comes down to."""
    if each[0].impl != "triton":
        return members.READ_ONCE
    return members.told([path.strategy for path in each], outputs, place)


def _calls(x, weights, lora_a, lora_b, scales, biases, dropout_p, seed, impl) -> list[tuple]:
    """Arguments and options of each member's own `lora_linear`."""
    each = members.by_member(
        NAME, len(weights), weights=weights, lora_a=lora_a, lora_b=lora_b, scales=scales,
        biases=biases,
    )  # fmt: skip
    shared = {"dropout_p": dropout_p, "seed": seed, "impl": impl}
    return [
        ((x, weight, a, b, scale), {"bias": bias, **shared}) for weight, a, b, scale, bias in each
    ]


class Member(NamedTuple):
    """The tensors of one member, in the operator's order."""

    weight: torch.Tensor
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    bias: torch.Tensor | None
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
    ys = [x.new_empty(x.shape[0], member.weight.shape[0]) for member in parts]
    dtype = x.dtype if common.impl == "eager" else torch.float32
    return ys, [x.new_empty(x.shape[0], sum(m.lora_a.shape[0] for m in parts), dtype=dtype)]


_operator = define_group(
    GroupOperation(
        NAME, Member, _path, _fake,
        reads_x=lambda needs, common: any(member.lora_a for member in needs),
        to_keep=lambda kept, needs, common: kept,
    )
)  # fmt: skip
