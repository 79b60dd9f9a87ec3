"""What stands round a model: `torch.compile`'s wrapper, and those for several devices."""

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .errors import AdapterError


def check_bare(model: Any) -> None:
    """Refuse what is no model or wraps one: what is done to it would be the wrapper's, and lost."""
    if not isinstance(model, nn.Module) or _wrapped(model) is not None:
        raise AdapterError(
            f"got a {type(model).__name__}, allowed: a torch.nn.Module that is not wrapped yet;"
            " compile it, or wrap it for several devices or processes, after it was adapted or"
            " quantized"
        )


def unwrapped(model: Any) -> Any:
    """The model within all its wrappers."""
    while (inner := _wrapped(model)) is not None:
        model = inner
    return model


def _wrapped(model: Any) -> nn.Module | None:
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return model.module
    # That of torch.compile by its child: to import the class is to import the compiler.
    return model._modules.get("_orig_mod") if isinstance(model, nn.Module) else None
