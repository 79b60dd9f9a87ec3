"""A run whose loss is no number any more ends before its result takes an earlier one's place."""

import math

from torch import nn
from transformers import TrainerCallback

from ..errors import AdapterError, listed

_REMEDY = "training has diverged; begin anew with a lower training.learning_rate"


class StopWhereDiverged(TrainerCallback):
    """Ends the run at the first report of a loss that is not finite."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            check_loss(f"the loss at step {state.global_step}", logs["loss"])


def check_loss(name: str, loss: float) -> None:
    """Raise AdapterError for a loss that is not finite; `name` is what it is of."""
    if not math.isfinite(loss):
        raise AdapterError(f"{name} is {loss}: {_REMEDY}")


def check_parameters(model: nn.Module) -> None:
    """Raise AdapterError where what was trained is not finite, as after a last loss that was."""
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    if names := [name for name, parameter in trained if not parameter.isfinite().all()]:
        raise AdapterError(f"{listed(names)}: not finite: {_REMEDY}")
