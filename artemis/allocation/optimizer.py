"""What an optimizer remembers of parameters that change size."""

from collections.abc import Iterable
from typing import Any

import torch

from ..errors import AdapterError
from .change import Change, along

#: Endings of the names under which torch's optimizers keep means or sums of squared gradients.
SQUARES = ("_sq", "square_avg", "sum")


def check_states(optimizer: torch.optim.Optimizer, changes: Iterable[Change]) -> None:
    """Raise `AdapterError` where the state of a parameter cannot follow it."""
    for change in changes:
        for name, value in optimizer.state.get(change.parameter, {}).items():
            if _is_number(value) or _has_shape(value, change.parameter):
                continue
            raise AdapterError(
                f"optimizer: {type(optimizer).__name__} keeps {name!r} in a form of its own"
                f" ({_in_words(value)} for a parameter {tuple(change.parameter.shape)}); allowed:"
                " optimizers whose state has the parameter's shape"
            )


def move_states(optimizer: torch.optim.Optimizer, changes: Iterable[Change]) -> None:
    """Change what is remembered of gradients as gradients change; new units start from nothing."""
    for change in changes:
        state = optimizer.state.get(change.parameter, {})
        for name, value in state.items():
            if _is_number(value):
                continue
            squared = name.endswith(SQUARES)
            matrix = change.moment.square() if squared else change.moment
            state[name] = along(matrix, value, change.dim)


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() == 0
    return value is None or isinstance(value, (int, float))


def _has_shape(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def _in_words(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{tuple(shape)}"
