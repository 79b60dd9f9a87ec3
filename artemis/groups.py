"""Modules that read the same tensor (q, k and v; gate and up), computed in one operation.

Models call them one after the other. The first one called computes all outputs and leaves the
others' for their own calls, hooks and all; they are handed over only for the very same tensor under
the same conditions. Where an output was left and not fetched (keys of another tensor, a pass broken
off), the group dissolves for good: what was wasted once is not wasted twice.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from .layers import weight_of


class _Left(NamedTuple):
    """Outputs waiting for their modules, and what must be the same when they are fetched."""

    x: torch.Tensor
    conditions: tuple
    outputs: dict[int, torch.Tensor]  # position in the group -> y


@dataclass(eq=False)
class InputGroup:
    """Adapted linear layers of one kind of adapter that read the same tensor."""

    modules: list[nn.Module] = field(default_factory=list)
    dissolved: bool = False
    #: What each module did in its last forward pass, for recomputation to do again.
    joined: dict[int, bool] = field(default_factory=dict)
    _left: _Left | None = None

    def add(self, module: nn.Module) -> None:
        """Make an adapted module a member, before the first forward."""
        module.adapter.group = self
        self.joined[len(self.modules)] = False
        module.adapter.place = len(self.modules)
        self.modules.append(module)

    def output(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """The output of a member for x [..., in]; None: it is to be computed alone."""
        place, conditions = module.adapter.place, _conditions(module, x)
        left = self._left
        if left is not None:
            y = None
            if left.x is x and left.conditions == conditions:
                y = left.outputs.pop(place, None)
            if y is None:
                self.dissolved = True
            if y is None or not left.outputs:
                self._left = None
            if y is not None:
                return y
        if _recomputing():
            joins = self.joined[place]
        else:
            joins = self.joined[place] = not self.dissolved and self._can_join(module)
        if not joins:
            return None
        outputs = dict(enumerate(self._compute(module, x)))
        y = outputs.pop(place)
        self._left = _Left(x, conditions, outputs)
        return y

    def _can_join(self, module: nn.Module) -> bool:
        site = module.adapter
        return site.bank.config.grouping and all(
            other.adapter.active
            and other.training == module.training
            # accelerate sets it, and may bring the weights only for that call.
            and "forward" not in vars(other)
            for other in self.modules
        ) and site.can_join(module.training)  # fmt: skip

    def _compute(self, module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sites = [other.adapter for other in self.modules]
        weights = [weight_of(other) for other in self.modules]
        biases = [other.bias for other in self.modules]
        return module.adapter.linear_group(x, sites, weights, biases, module.training)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_left": None}  # an output in flight is no part of a copy


def _conditions(module: nn.Module, x: torch.Tensor) -> tuple:
    """What an output depends on beside the tensors."""
    kind = x.device.type
    can_cast = torch.amp.is_autocast_available(kind)  # the meta device cannot
    cast = can_cast and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    changes = None if torch.compiler.is_compiling() or x.is_inference() else x._version
    return torch.is_grad_enabled(), module.training, module.adapter.active, cast, changes


def _recomputing() -> bool:
    """Whether a backward pass is under way: activation checkpointing calls modules again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
