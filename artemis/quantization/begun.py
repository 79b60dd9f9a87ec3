"""What a call that packs a model has done so far; it stands on the model until the call ends."""

from dataclasses import dataclass, field

import torch
from torch import nn

from .options import Options
from .report import LayerReport

#: Name under which it stands there.
BEGUN = "quantization_begun"


@dataclass(frozen=True)
class Begun:
    """A weight is dropped once it is packed, so what an interrupted call has done stays done.

    The next call with the same options goes on.
    """

    options: Options
    #: The dtype of the first weight, as it was.
    dtype: torch.dtype
    bytes_before: int
    #: Name of a parameter that is packed -> what became of it.
    reports: dict[str, LayerReport] = field(default_factory=dict)


def begun(model: nn.Module) -> Begun | None:
    """What a call that was interrupted left, or None."""
    return getattr(model, BEGUN, None)
