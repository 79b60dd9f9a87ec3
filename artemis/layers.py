"""Linear layers with an adapter: subclasses over the very same parameters.

Injection sets `module.__class__`, so no parameter moves or changes its name, `isinstance` still
holds, and, the classes being importable, whole models pickle.
"""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .sites import Site


class AdaptedLinear(nn.Linear):
    """`nn.Linear` whose forward runs its site's operation."""

    adapter: Site

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        if not self.adapter.active:
            return super().forward(input)
        return self.adapter.linear(input, self.weight, self.bias, self.training)

    def extra_repr(self) -> str:
        spec = self.adapter.spec
        return f"{super().extra_repr()}, {spec.kind}={spec.size}"


class AdaptedConv1D(Conv1D):
    """transformers' `Conv1D` (GPT-2) whose forward runs its site's operation."""

    adapter: Site

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        if not self.adapter.active:
            return super().forward(x)
        return self.adapter.linear(x, weight_of(self), self.bias, self.training)

    def __repr__(self) -> str:
        spec = self.adapter.spec
        return f"AdaptedConv1D(nf={self.nf}, nx={self.nx}, {spec.kind}={spec.size})"


ADAPTED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: AdaptedLinear, Conv1D: AdaptedConv1D}


def weight_of(module: nn.Linear | Conv1D) -> torch.Tensor:
    """The layer's weight as (out, in): a view of it where it is stored the other way round."""
    return module.weight if isinstance(module, nn.Linear) else module.weight.t()


def adapt(module: nn.Module, site: Site) -> None:
    """Turn a linear layer into its adapted class, in place."""
    module.__class__ = ADAPTED[type(module)]
    module.adapter = site


def restore(module: nn.Module) -> None:
    """Turn an adapted layer back into what it was."""
    module.__class__ = {new: old for old, new in ADAPTED.items()}[type(module)]
    del module.adapter
