"""Linear layers with an adapter: subclasses over the very same parameters, packed ones included.

Injection sets `module.__class__`, so no parameter moves or changes its name, `isinstance` still
holds, and, the classes being importable, whole models pickle.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from . import frozen
from .frozen import weight_of
from .quantized_layers import QUANTIZED, QuantizedConv1D, QuantizedLinear
from .sites import Site


class _DropsConstants:
    """What the adapted classes share."""

    adapter: Site

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode; where training begins, what was worked out for inference is dropped.

        A compiled forward cannot do that, and fused optimizers change tensors uncounted.
        """
        if mode:
            self.adapter.forget()
        return super().train(mode)


class AdaptedLinear(_DropsConstants, nn.Linear):
    """`nn.Linear` whose forward runs its site's operation."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        if not self.adapter.active:
            return super().forward(input)
        return _adapted(self, input, super().forward)

    def extra_repr(self) -> str:
        spec = self.adapter.spec
        return f"{super().extra_repr()}, {spec.kind}={spec.size}"


class AdaptedConv1D(_DropsConstants, Conv1D):
    """transformers' `Conv1D` (GPT-2) whose forward runs its site's operation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        if not self.adapter.active:
            return super().forward(x)
        return _adapted(self, x, super().forward)

    def __repr__(self) -> str:
        spec = self.adapter.spec
        return f"AdaptedConv1D(nf={self.nf}, nx={self.nx}, {spec.kind}={spec.size})"


class AdaptedQuantizedLinear(AdaptedLinear, QuantizedLinear):
    """An adapted linear layer over a packed weight."""


class AdaptedQuantizedConv1D(AdaptedConv1D, QuantizedConv1D):
    """An adapted `Conv1D` over a packed weight."""


ADAPTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: AdaptedLinear,
    Conv1D: AdaptedConv1D,
    QuantizedLinear: AdaptedQuantizedLinear,
    QuantizedConv1D: AdaptedQuantizedConv1D,
}
#: Any linear layer, adapted or not -> the class of the same over a packed weight.
PACKED: dict[type[nn.Module], type[nn.Module]] = QUANTIZED | {
    ADAPTED[plain]: ADAPTED[packed] for plain, packed in QUANTIZED.items()
}


def _adapted(
    module: nn.Linear | Conv1D, x: torch.Tensor, base: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The site's operation on x: at inference from its constants; else alone, or with the modules
    that read the same x."""
    site = module.adapter
    y = frozen.output(module, x, site, base)
    if y is None and site.group is not None:
        y = site.group.output(module, x)
    return site.linear(x, weight_of(module), module.bias, module.training) if y is None else y


def adapt(module: nn.Module, site: Site) -> None:
    """Turn a linear layer into its adapted class, in place."""
    module.__class__ = ADAPTED[type(module)]
    module.adapter = site


def restore(module: nn.Module) -> None:
    """Turn an adapted layer back into what it was."""
    module.__class__ = {new: old for old, new in ADAPTED.items()}[type(module)]
    del module.adapter
