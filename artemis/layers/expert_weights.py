"""`ExpertWeights`: packed matrices of many experts, in one storage."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from artemis_kernels import QuantizedWeight


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """Packed matrices of many experts; `weights[e]` is the `QuantizedWeight` of one, a view."""

    data: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None
    format: str
    group_size: int | None
    activation_bits: int | str
    #: What the parameter would have if it were not packed.
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        """ValueError where the parts do not fit together."""
        parts = [part for part in (self.data, self.scale, self.offset) if part is not None]
        if {part.dim() for part in parts} - {2, 3} or len({len(part) for part in parts}) > 1:
            raise ValueError("ExpertWeights: parts of another number of experts")
        self[0]  # checks the rest

    @classmethod
    def quantize(
        cls,
        stack: torch.Tensor,
        format: str,
        *,
        importance: Sequence[torch.Tensor | None] | None = None,
        **options: Any,
    ) -> "ExpertWeights":
        """Round `stack` (experts, out, in), expert after expert; as `QuantizedWeight.quantize`."""
        parts: list[torch.Tensor] = []
        importance = importance or [None] * len(stack)
        for expert, (matrix, counts) in enumerate(zip(stack, importance, strict=True)):
            weight = QuantizedWeight.quantize(matrix, format, importance=counts, **options)
            own = [part for part in (weight.data, weight.scale, weight.offset) if part is not None]
            parts = parts or [part.new_empty(len(stack), *part.shape) for part in own]
            for whole, part in zip(parts, own, strict=True):
                whole[expert] = part
        data, scale, offset = (*parts, None)[:3]
        return cls(
            data, scale, offset, format, weight.group_size, weight.activation_bits, stack.dtype
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, expert: int) -> QuantizedWeight:
        offset = None if self.offset is None else self.offset[expert]
        return QuantizedWeight(
            self.data[expert], self.scale[expert], offset, self.format, self.group_size,
            self.activation_bits,
        )  # fmt: skip

    @property
    def shape(self) -> torch.Size:
        """(experts, out, in)."""
        return torch.Size((len(self), *self[0].shape))

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(p.nbytes for p in (self.data, self.scale, self.offset) if p is not None)

    def to(self, device: torch.device | str) -> "ExpertWeights":
        """The same weights on `device`."""
        offset = None if self.offset is None else self.offset.to(device)
        return replace(self, data=self.data.to(device), scale=self.scale.to(device), offset=offset)
