"""Holding the adapter's own tensors in 32, 16 or 8 bits."""

from collections.abc import Iterator

import torch
from torch import nn

from artemis_kernels import QuantizedWeight

from ..errors import AdapterError
from ..layers.bank import AdapterBank
from ..layers.packed import FixedBuffers

_MATRICES = ("lora_a", "lora_b", "down", "up")


def check_adapter(bank: AdapterBank, bits: int, model_dtype: torch.dtype) -> None:
    """Raise `AdapterError` where `hold` could not pack a matrix in 8 bits."""
    if bits != 8:
        return
    narrow = _narrow(model_dtype)
    for name, matrix in bank.named_parameters():
        if name.partition(".")[0] in _MATRICES and not matrix.to(narrow).isfinite().all():
            raise AdapterError(
                f"adapter_bits: got 8, and the adapter's {name} holds inf or nan, or numbers beyond"
                f" {narrow}; allowed: finite matrices, or 16 or 32"
            )


def hold(bank: AdapterBank, bits: int, model_dtype: torch.dtype) -> None:
    """Convert the bank in place; 8: matrices in int8 by row, and nothing trains any more.

    16 bits are the model's own where it has such, else bf16.
    """
    narrow = _narrow(model_dtype)
    if bits != 8:
        bank.to(torch.float32 if bits == 32 else narrow)
        return
    bank.for_use_only = True
    bank.to(narrow).requires_grad_(False)
    for role in _MATRICES:
        table = getattr(bank, role)
        if not isinstance(table, PackedTable):  # an interrupted call may have packed it
            setattr(bank, role, PackedTable(table, narrow))


def _narrow(model_dtype: torch.dtype) -> torch.dtype:
    return model_dtype if model_dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


class PackedTable(FixedBuffers, nn.Module):
    """A table of the bank in int8: reads like the `ParameterDict` that it stands for."""

    def __init__(self, table: nn.ParameterDict, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self._keys = list(table.keys())
        for index, matrix in enumerate(table.values()):
            packed = QuantizedWeight.quantize(matrix)
            self.register_buffer(f"data_{index}", packed.data)
            self.register_buffer(f"scale_{index}", packed.scale)

    def fixed_buffers(self) -> list[str]:
        return list(self._buffers)

    def __getitem__(self, key: str) -> torch.Tensor:
        """The matrix that the numbers stand for."""
        index = self._keys.index(key)
        data, scale = getattr(self, f"data_{index}"), getattr(self, f"scale_{index}")
        return QuantizedWeight(data, scale, None, "int8", None).dequantize(self.dtype)

    def places(self, key: str) -> list[tuple[dict, str]]:
        """Where the matrix is stored: as `AdapterBank.places`."""
        index = self._keys.index(key)
        return [(self._buffers, f"data_{index}"), (self._buffers, f"scale_{index}")]

    def keys(self) -> list[str]:
        return self._keys

    def values(self) -> Iterator[torch.Tensor]:
        return (self[key] for key in self._keys)

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((key, self[key]) for key in self._keys)
