"""The orthogonality penalty as the trainer adds it: its gradient, once per optimizer step."""

import torch
from torch import nn

from ..layers.bank import find_bank
from ..orthogonality import orthogonality_penalty


def penalty_weight(model: nn.Module) -> float:
    """The weight that the adapter's configuration gives the penalty; 0 without an adapter."""
    bank = find_bank(model)
    return 0.0 if bank is None else bank.config.orthogonality_weight


def add_penalty_gradient(model: nn.Module, scaler: torch.amp.GradScaler | None = None) -> None:
    """Add the penalty's gradient to the accumulated ones, before clipping.

    `autograd.grad` runs no hooks, so under DDP the term is added after the gradients have been
    averaged, alike in every process. The reported loss stays the task's own.
    """
    weight = penalty_weight(model)
    if not weight:
        return
    parameters = [p for p in find_bank(model).parameters() if p.requires_grad]
    penalty = weight * orthogonality_penalty(model)
    if not penalty.requires_grad:
        return
    if scaler is not None:
        # fp16: the accumulated gradients carry the scaler's factor until the optimizer steps.
        penalty = penalty * scaler.get_scale()
    gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = gradient.clone()
        else:
            parameter.grad.add_(gradient)
