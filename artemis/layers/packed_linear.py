"""Linear layers whose weight is held in 8 or 4 bits, under the very same module path.

Like an adapter, packing sets `module.__class__`: `isinstance` holds and whole models pickle. In
the place of the parameter `weight` stand buffers (packed.py).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from artemis_kernels import FrozenAdapter, FrozenLinear, QuantizedWeight, quantized_linear

from ..errors import AdapterError
from .frozen_head import FrozenHead
from .packed import Packed, Packing, held, hold, packed_modules, parts_of, sample_of
from .sources import Source, is_captured, sources_of, takes_constants, unchanged

#: Buffers of a packed layer, in the order of `QuantizedWeight`'s tensors.
PARTS = parts_of("weight")
SAMPLE = sample_of("weight")


@dataclass(frozen=True, eq=False)
class LayerWeight(QuantizedWeight):
    """A layer's packed weight; models ask weights for their dtype to cast their input to it."""

    #: What the layer's weight would have if it were not packed.
    dtype: torch.dtype = torch.float32

    def __getitem__(self, _: object) -> torch.Tensor:
        raise AdapterError(
            f"a weight in {self.format} has no rows to read, which a loss that multiplies by the"
            " output head's weight itself wants (TRL's in pieces): leave the head as it is"
            " (include_head=False)"
        )


class _PackedLayer(Packed):
    """What both classes of packed layers share. Beside it stands `nn.Linear` or `Conv1D`."""

    #: The layer at inference and what it was made of; no part of a copy.
    ready: tuple[tuple[Source, ...], FrozenLinear] | None = None

    def packed_shapes(self) -> Mapping[str, tuple[int, ...]]:
        shape = tuple(self.weight.shape)
        return {"weight": shape if isinstance(self, nn.Linear) else shape[::-1]}

    @property
    def weight(self) -> LayerWeight:
        """The weight (out, in), also where the layer stored it the other way round."""
        packing, dtype = self.packing, self._buffers[SAMPLE].dtype
        return LayerWeight(
            *held(self, "weight"), packing.format, packing.group_size, packing.activation_bits,
            packing.makes_logits, dtype,
        )  # fmt: skip

    def _output(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        linear = self._at_inference(x)
        if linear is None:
            return quantized_linear(x, self.weight, bias=self.bias)
        return linear(x)

    def _at_inference(self, x: torch.Tensor) -> FrozenLinear | None:
        """The layer without the overhead of an operator, where no one has to see one."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        if not takes_constants(self, x):
            return None
        ready = self.ready
        if ready is not None:
            sources, linear = ready
            if linear.adapter.dtype == x.dtype and unchanged(self, sources):
                return linear
        self.ready = None
        places = [(self._buffers, name) for name in PARTS]
        sources = sources_of([*places, (self._parameters, "bias")])
        if sources is None or is_captured(x):
            return None
        adapter = FrozenAdapter.none(self.weight, bias=self.bias, dtype=x.dtype)
        linear = FrozenLinear(self.weight, adapter)
        self.ready = sources, linear
        return linear

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        self.ready = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"ready": None}


class QuantizedLinear(_PackedLayer, nn.Linear):
    """`nn.Linear` over a packed weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return self._output(input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={self.packing.format}"


class QuantizedConv1D(_PackedLayer, Conv1D):
    """transformers' `Conv1D` (GPT-2) over a packed weight, stored (out, in)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return self._output(x)

    def __repr__(self) -> str:
        return f"QuantizedConv1D(nf={self.nf}, nx={self.nx}, weight={self.packing.format})"


QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    FrozenHead: QuantizedLinear,
    Conv1D: QuantizedConv1D,
}


def packed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every packed linear layer of `model`, each once."""
    return ((path, m) for path, m in packed_modules(model) if isinstance(m, _PackedLayer))


def pack(
    module: nn.Module,
    cls: type[nn.Module],
    weight: QuantizedWeight,
    taken: torch.Tensor,
    untied: bool = False,
) -> None:
    """Turn a linear layer into `cls`, a packed class, over `weight`; its own weight is dropped.

    `taken` is the `sample` of the weight that `weight` was made from; `untied`: see `Packing`.
    Interrupted at any line, the layer computes, as what it was or as what it becomes.
    """
    module.packing = Packing(
        weight.format, weight.group_size, weight.activation_bits, weight.makes_logits, untied
    )
    hold(module, "weight", (weight.data, weight.scale, weight.offset), taken)
    module.__class__ = cls
    del module._parameters["weight"]  # `weight` is the class's property by now
