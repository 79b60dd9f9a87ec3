"""What an optimizer remembers of parameters that change size.

Known are the tensors of a parameter's shape that these keep:

    exp_avg, exp_avg_sq, max_exp_avg_sq     Adam, AdamW, NAdam, RAdam, SparseAdam; Lion the first
    exp_inf                                 Adamax, beside exp_avg
    momentum_buffer                         SGD, Muon, RMSprop
    square_avg, grad_avg                    RMSprop; Adadelta the first
    acc_delta                               Adadelta
    sum                                     Adagrad
    state1, state2                          bitsandbytes' optimizers in 32 bits
"""

from collections.abc import Iterable
from typing import Any

import torch

from ..errors import AdapterError, listed
from .change import Change, along

#: Means of gradients, which change as gradients do.
MEANS = ("exp_avg", "momentum_buffer", "grad_avg", "state1")
#: Means or sums of squared gradients, which must not become negative.
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "state2")
#: The largest of gradients without their signs.
SIZES = ("exp_inf",)
#: Means of squares of the parameter's own steps.
STEPS = ("acc_delta",)
#: Of bitsandbytes' optimizers, by `optimizer_name`: those whose `state1` holds squares.
STATE1_SQUARED = ("adagrad", "rmsprop")


def check_states(optimizer: torch.optim.Optimizer, changes: Iterable[Change]) -> None:
    """Raise `AdapterError` where the state of a parameter cannot follow it."""
    for change in changes:
        for name, value in optimizer.state.get(change.parameter, {}).items():
            if _is_number(value):
                continue
            if not _has_shape(value, change.parameter):
                raise AdapterError(
                    f"optimizer: {type(optimizer).__name__} keeps {name!r} in a form of its own"
                    f" ({_in_words(value)} for a parameter {tuple(change.parameter.shape)});"
                    " allowed: optimizers whose state has the parameter's shape"
                )
            known = (*MEANS, *SQUARES, *SIZES, *STEPS)
            if name not in known:
                raise AdapterError(
                    f"optimizer: {type(optimizer).__name__} keeps {name!r}, of which it is not"
                    f" known how it follows a parameter to another size; allowed: {listed(known)}"
                )


def move_states(optimizer: torch.optim.Optimizer, changes: Iterable[Change]) -> None:
    """Change what is remembered of gradients as gradients change.

    New units start from nothing (docs/importance.md says what that does under Adam).
    """
    for change in changes:
        state = optimizer.state.get(change.parameter, {})
        moved = {
            name: _moved(_kind(optimizer, name), change, value)
            for name, value in state.items()
            if not _is_number(value)
        }
        if "grad_avg" in moved:
            # RMSprop takes the root of the difference: what is left of squares without the mean.
            scatter = (state["square_avg"] - state["grad_avg"].square()).clamp_(min=0)
            moved["square_avg"] = _moved(SQUARES, change, scatter) + moved["grad_avg"].square()
        state.update(moved)


def _kind(optimizer: torch.optim.Optimizer, name: str) -> tuple[str, ...]:
    """The list that says how the tensor called `name` changes."""
    # accelerate wraps the optimizer.
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if name == "state1" and getattr(optimizer, "optimizer_name", "") in STATE1_SQUARED:
        return SQUARES
    return next(kind for kind in (MEANS, SQUARES, SIZES, STEPS) if name in kind)


def _moved(kind: tuple[str, ...], change: Change, value: torch.Tensor) -> torch.Tensor:
    if kind is MEANS:
        return along(change.moment, value, change.dim)
    if kind is STEPS:
        return along(change.value.square(), value, change.dim)
    if kind is SIZES:
        return along(change.moment.square(), value.square(), change.dim).sqrt_()
    return along(change.moment.square(), value, change.dim)


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() == 0
    return value is None or isinstance(value, (int, float))


def _has_shape(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def _in_words(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{tuple(shape)}"
