"""Modules that read the same tensor (q, k and v; gate and up), computed in one operation.

Models call them one after the other. The first one called computes all outputs and leaves the
others' for their own calls, hooks and all; they are handed over only for the very same tensor under
the same conditions. Where an output was left and not fetched (keys of another tensor, a pass broken
off), the group dissolves for good: what was wasted once is not wasted twice. Only a change of x in
place inside one compiled graph goes unseen (docs/groups.md).
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from .linear import has_own_tensors, weight_of


class _Left(NamedTuple):
    """Outputs waiting for their modules, and what must be the same when they are fetched."""

    group: "InputGroup"
    x: torch.Tensor
    conditions: tuple
    outputs: dict[int, tuple[torch.Tensor, Any]]  # position in the group -> y, site's versions


@dataclass(eq=False)
class Shelf:
    """Where the outputs of one group wait: one for a whole model.

    So what a broken pass left, and the graph behind it, goes when the next pass begins.
    """

    left: _Left | None = None

    def fetch(self, module: nn.Module, x: torch.Tensor, conditions: tuple) -> torch.Tensor | None:
        """The output that waits for this call; None, and an empty shelf, where there is none."""
        left, site, y = self.left, module.adapter, None
        if left is None:
            return None
        if left.group is site.group and left.x is x and left.conditions == conditions:
            y, versions = left.outputs.pop(site.place, (None, None))
            if versions != site.versions():
                y = None
        if y is None:
            left.group.dissolved = True
        if y is None or not left.outputs:
            self.left = None
        return y

    def __getstate__(self) -> dict[str, Any]:
        return {"left": None}  # an output in flight is no part of a copy


@dataclass(eq=False)
class InputGroup:
    """Adapted linear layers of one kind of adapter that read the same tensor."""

    shelf: Shelf
    modules: list[nn.Module] = field(default_factory=list)
    dissolved: bool = False
    #: What each module did in the last forward pass that a backward may follow, for recomputation
    #: to do again.
    joined: dict[int, bool] = field(default_factory=dict)

    def add(self, module: nn.Module) -> None:
        """Make an adapted module a member, before the first forward."""
        place = len(self.modules)
        module.adapter.group, module.adapter.place = self, place
        self.joined[place] = False
        self.modules.append(module)

    def output(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """The output of a member for x [..., in]; None: it is to be computed alone."""
        place, conditions = module.adapter.place, _conditions(module, x)
        y = self.shelf.fetch(module, x, conditions)
        if y is not None:
            return y
        if _recomputing():
            joins = self.joined[place]
        else:
            joins = not self.dissolved and self._can_join(module, x)
            if module.training or torch.is_grad_enabled():
                self.joined[place] = joins
        if not joins:
            return None
        outputs = self._compute(module, x)
        others = {
            other.adapter.place: (y, other.adapter.versions())
            for other, y in zip(self.modules, outputs, strict=True)
            if other is not module
        }
        self.shelf.left = _Left(self, x, conditions, others)
        return outputs[place]

    def _can_join(self, module: nn.Module, x: torch.Tensor) -> bool:
        site = module.adapter
        return site.bank.config.grouping and not _in_inference_mode(x) and all(
            other.adapter.active
            and other.training == module.training
            # accelerate sets it, and may bring the weights only for that call.
            and "forward" not in vars(other)
            # A hook of the sibling's own call makes the others.
            and has_own_tensors(other)
            for other in self.modules
        ) and site.can_join(module.training)  # fmt: skip

    def _compute(self, module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sites = [other.adapter for other in self.modules]
        weights = [weight_of(other) for other in self.modules]
        biases = [other.bias for other in self.modules]
        return module.adapter.linear_group(x, sites, weights, biases, module.training)


def _conditions(module: nn.Module, x: torch.Tensor) -> tuple:
    """What an output depends on beside the tensors."""
    kind = x.device.type
    can_cast = kind in ("cpu", "cuda")  # the meta device cannot
    cast = can_cast and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    changes = None if torch.compiler.is_compiling() or x.is_inference() else x._version
    return torch.is_grad_enabled(), module.training, module.adapter.active, cast, changes


def _in_inference_mode(x: torch.Tensor) -> bool:
    """Whether no one counts the changes of x, or outputs would be good for this mode only."""
    if torch.compiler.is_compiling():
        return False
    return x.is_inference() or torch.is_inference_mode_enabled()


def _recomputing() -> bool:
    """Whether a backward pass is under way: activation checkpointing calls modules again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
