"""What a linear layer is: `nn.Linear` or GPT-2's `Conv1D`, over a plain weight or a packed one."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from artemis_kernels import QuantizedWeight

from .frozen_head import FrozenHead
from .packed import is_packed
from .packed_linear import QuantizedConv1D, QuantizedLinear

Weight = torch.Tensor | QuantizedWeight


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is one by class, subclasses included: adapted, packed, another library's."""
    return isinstance(module, (nn.Linear, Conv1D))


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """Return (in, out) of a linear layer that can be adapted, or None.

    Exact classes only: another's subclass has a forward of its own, which adapting would replace.
    """
    if type(module) in (nn.Linear, FrozenHead, QuantizedLinear):
        return module.in_features, module.out_features
    if type(module) in (Conv1D, QuantizedConv1D):
        return module.nx, module.nf
    return None


def linear_paths(model: nn.Module) -> list[str]:
    """Paths of all layers of `model` that `linear_features` knows."""
    return [path for path, module in model.named_modules() if linear_features(module)]


def weight_of(module: nn.Module) -> Weight:
    """The layer's weight as (out, in): a view of it where it is stored the other way round."""
    if isinstance(module, nn.Linear) or is_packed(module):
        return module.weight
    return module.weight.t()


def dense_weight_of(module: nn.Module) -> torch.Tensor:
    """`weight_of` without a graph, and where it is packed what its numbers stand for, in fp32."""
    weight = weight_of(module)
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight.detach()


def has_own_tensors(module: nn.Module) -> bool:
    """Whether weight and bias of a linear layer are its parameters, or packed.

    Those that pruning, weight norms and parametrizations work out at each forward are not, and
    before the layer's own call they may be old.
    """
    own = module._parameters
    return "bias" in own and ("weight" in own or is_packed(module))
