"""The bottleneck's activations and their derivatives, as torch calls for the eager path."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

aten = torch.ops.aten


class Activation(NamedTuple):
    """`forward(z) -> act(z)` and `backward(dh, z) -> dh · act'(z)`, both of z's dtype."""

    forward: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


ACTIVATIONS = {
    "relu": Activation(functional.relu, lambda dh, z: aten.threshold_backward(dh, z, 0)),
    "gelu": Activation(functional.gelu, aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda z: functional.gelu(z, approximate="tanh"),
        lambda dh, z: aten.gelu_backward(dh, z, approximate="tanh"),
    ),
    "silu": Activation(functional.silu, aten.silu_backward),
    "identity": Activation(lambda z: z, lambda dh, z: dh),
}
