"""A bottleneck on the output of a whole block, as the block's forward hook."""

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from artemis_kernels import bottleneck_adapter

from ..errors import AdapterError
from .sites import Bottleneck


def with_first(output: tuple, first: torch.Tensor) -> tuple:
    """`output` with another first member; a named tuple keeps its class."""
    if hasattr(output, "_fields"):
        return type(output)(first, *output[1:])
    return (first, *output[1:])


class BlockSite(Bottleneck):
    """A bottleneck on the output of a block, as the block's forward hook."""

    #: Takes the hook out again.
    hook: RemovableHandle | None = None

    def __call__(self, module: nn.Module, args: tuple, output):
        """Adapt `output`: a tensor [..., hidden], or a tuple that starts with one.

        Raises `TypeError` for any other output, `AdapterError` for one of another width.
        """
        if not self.active:
            return output
        if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
            return with_first(output, self._adapt(output[0], module.training))
        if isinstance(output, torch.Tensor):
            return self._adapt(output, module.training)
        raise TypeError(
            f"{self.spec.path} returned a {type(output).__name__}; a bottleneck on a block needs a"
            " tensor or a tuple that starts with one"
        )

    def _adapt(self, x: torch.Tensor, training: bool) -> torch.Tensor:
        if x.shape[-1] != self.spec.in_features:
            raise AdapterError(
                f"{self.spec.path} returned {x.shape[-1]} features, and its bottleneck is for"
                f" {self.spec.in_features}, the hidden_size of its configuration; leave it out, or"
                " name its linear layers instead"
            )
        return bottleneck_adapter(
            x,
            impl=self.bank.config.impl,
            **self.arguments(self.tensors()),
            **self.own_mask(training, x),
        )
