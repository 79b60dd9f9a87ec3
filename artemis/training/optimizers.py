"""Whether an optimizer trains what its model is now.

A second adapter on a model has other parameters than the optimizer of the run before, which would
go on with what nothing reads; modules that changed size between two runs have parameters of other
shapes than what it remembers of them, which torch's fused steps do not notice.
"""

import torch
from torch import nn

from ..allocation.optimizer import MEANS, SIZES, SQUARES, STEPS


def untrained(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of the parameters that require a gradient and are not the optimizer's."""
    held = _held(optimizer)
    return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]


def holds_others(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    """Whether the optimizer has parameters that are not the model's."""
    return not _held(optimizer) <= {id(parameter) for parameter in model.parameters()}


def resized(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of the parameters that have another shape than what the optimizer keeps of them."""
    known = (*MEANS, *SQUARES, *SIZES, *STEPS)
    return [
        name
        for name, parameter in model.named_parameters()
        for kept in map(optimizer.state.get(parameter, {}).get, known)
        if torch.is_tensor(kept) and kept.shape != parameter.shape
    ]


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
