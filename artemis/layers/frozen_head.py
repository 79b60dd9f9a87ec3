"""The output head of an adapted model that carries no adapter itself."""

import torch
from torch import nn

from artemis_kernels import quantized_linear

_FEW_ROWS = 8  # of which torch's product takes no longer


class FrozenHead(nn.Linear):
    """`nn.Linear` that trains through its frozen weight as adapted layers do through theirs.

    In bf16 on a CPU only: there BLAS takes up to a third longer for dX over a large vocabulary.
    Without gradients it computes as its base does, bit for bit.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        if not self._takes(input):
            return super().forward(input)
        return quantized_linear(input, self.weight, bias=self.bias)

    def _takes(self, x: torch.Tensor) -> bool:
        weight = self.weight
        return (
            not torch.compiler.is_compiling()
            and type(x) is torch.Tensor
            and type(weight) is nn.Parameter  # another's would not be multiplied as it means
            and x.is_cpu
            and x.dtype == weight.dtype == torch.bfloat16
            and x.numel() >= _FEW_ROWS * x.shape[-1]
            and torch.is_grad_enabled()
            and x.requires_grad
            and not weight.requires_grad
        )
