"""Several members of an operation that read the same x, as one differentiable torch operator.

As in `registration.py`, but with lists. A member's tensors are the fields of a NamedTuple; the
operator takes those of all members in one flat list, so that autograd sees each of them.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from types import ModuleType
from typing import NamedTuple

import torch

from .base import in_features
from .registration import (
    Operation,
    by_place,
    define,
    differentiate,
    empty_like_needed,
    needed,
    once,
)

_ARGUMENTS = (
    "Tensor?[] operands, float[] scales, str activation, float dropout_p, Tensor? seed, str impl, "
    "str[] strategies"
)


class Common(NamedTuple):
    """What the members of a call have beside tensors: scales and strategies each, the rest one."""

    scales: Sequence[float]
    activation: str
    dropout_p: float
    seed: torch.Tensor | None
    impl: str
    strategies: Sequence[str]


class GroupOperation(NamedTuple):
    """What an operation says about its groups; `members` are tuples of the class `member`."""

    name: str
    member: type
    #: impl -> module with `forward(x, members, common) -> (ys, kept)` and
    #: `backward(dys, x, members, kept, common, needs_x, needs) -> (dx, members of gradients)`.
    path: Callable[[str], ModuleType]
    #: `(x, members, common)` -> empty tensors like y of each member, and like `kept`.
    fake: Callable[..., tuple[list[torch.Tensor], list[torch.Tensor]]]
    #: `(members of needs, common)` -> whether the backward reads x.
    reads_x: Callable[..., bool]
    #: `(kept, members of needs, common)` -> the same list, None for what no gradient needs.
    to_keep: Callable[..., list[torch.Tensor | None]]

    def members(self, operands: Sequence) -> list:
        """The flat list as members."""
        size = len(self.member._fields)
        return [self.member(*operands[i : i + size]) for i in range(0, len(operands), size)]


def define_group(op: GroupOperation) -> torch._ops.OpOverload:
    """Define the operators of `op`; return the differentiable one, `-> Tensor[]`."""

    def forward(x, operands, *common):
        common = Common(*common)
        return op.path(common.impl).forward(x, op.members(operands), common)

    def fake(x, operands, *common):
        return op.fake(x, op.members(operands), Common(*common))

    def backward(dys, x, operands, kept, scales, activation, dropout_p, seed, impl, strategies,
                 needs):  # fmt: skip
        common = Common(scales, activation, dropout_p, seed, impl, strategies)
        dx, gradients = op.path(impl).backward(
            dys, x, op.members(operands), kept, common, needs[0], op.members(needs[1:])
        )
        return needed((dx, *chain.from_iterable(gradients)), needs)

    def backward_fake(dys, x, operands, kept, *rest):
        needs, dy = rest[-1], next(dy for dy in dys if dy is not None)
        dx = dy.new_empty(dy.shape[0], in_features(op.members(operands)[0].weight))
        return empty_like_needed((dx, *operands), needs)

    operator = define(
        f"{op.name}(Tensor x, {_ARGUMENTS}) -> Tensor[]",
        lambda *arguments: forward(*arguments)[0], lambda *arguments: fake(*arguments)[0],
    )  # fmt: skip
    forward_operator = define(
        f"{op.name}_forward(Tensor x, {_ARGUMENTS}) -> (Tensor[], Tensor[])", forward, fake
    )
    backward_operator = define(
        f"{op.name}_backward(Tensor?[] dys, Tensor? x, "
        + _ARGUMENTS.replace("operands,", "operands, Tensor?[] kept,")
        + ", bool[] needs) -> Tensor[]",
        backward, backward_fake,
    )  # fmt: skip
    function = _function(op, forward_operator, backward_operator)

    def spread(x, operands, *common):
        return list(function.apply(Common(*common), x, *operands))

    differentiate(op.name, function, spread)
    return operator


def _function(op: GroupOperation, forward_operator, backward_operator):
    """The autograd Function of `op`, which takes the tensors of the list one by one."""

    class Function(Operation):
        @staticmethod
        def forward(ctx, common, x, *operands):
            with Operation.below_autograd():
                ys, kept = forward_operator(x, operands, *common)
            ctx.set_materialize_grads(False)  # an output that was not used costs nothing
            scales, activation, dropout_p, seed, impl, strategies = common
            ctx.options, ctx.path = (scales, activation, dropout_p), (impl, strategies)
            ctx.needs = list(ctx.needs_input_grad[1:])
            needs = op.members(ctx.needs[1:])
            kept_x = x if op.reads_x(needs, common) else None
            kept, ctx.size = op.to_keep(kept, needs, common), len(operands)
            ctx.save_for_backward(seed, kept_x, *operands, *kept)
            return tuple(ys)

        @staticmethod
        @once(op.name)
        def backward(ctx, *dys):
            seed, x, *tensors = ctx.saved_tensors
            operands, kept = tensors[: ctx.size], tensors[ctx.size :]
            needs, size = list(ctx.needs), len(op.member._fields)
            for index, dy in enumerate(dys):
                if dy is None:
                    needs[1 + index * size : 1 + (index + 1) * size] = [False] * size
            with Operation.below_autograd():
                gradients = backward_operator(
                    dys, x, operands, kept, *ctx.options, seed, *ctx.path, needs
                )
            return None, *by_place(gradients, needs)

    return Function
