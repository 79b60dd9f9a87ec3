"""Linear layers whose weight is held in 8 or 4 bits, under the very same module path.

Like an adapter, packing sets `module.__class__`: `isinstance` holds and whole models pickle. The
parameter `weight` gives way to buffers `weight_data`, `weight_scale`, `weight_offset` (int4 only)
and `weight_sample`, a few of its numbers, by which an adapter file still recognises the base.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from artemis_kernels import FrozenAdapter, FrozenLinear, QuantizedWeight, quantized_linear

from .sources import Source, is_captured, sources_of, takes_constants, unchanged

SAMPLES = 16
#: Buffers of a packed layer, in the order of `QuantizedWeight`'s tensors.
PARTS = ("weight_data", "weight_scale", "weight_offset")
SAMPLE = "weight_sample"


@dataclass(frozen=True)
class Packing:
    """How a layer's weight is packed: `QuantizedWeight`'s options, free of tensors."""

    format: str
    group_size: int | None
    activation_bits: int | str
    makes_logits: bool = False
    #: Whether the weight was another module's too, which keeps it: one matrix became two.
    untied: bool = False


@dataclass(frozen=True, eq=False)
class LayerWeight(QuantizedWeight):
    """A layer's packed weight; models ask weights for their dtype to cast their input to it."""

    #: What the layer's weight would have if it were not packed.
    dtype: torch.dtype = torch.float32


class FixedBuffers:
    """Mixin for modules: the buffers that `fixed_buffers` names are moved, and never cast.

    Seen as bytes they are no floating tensors, which `.to(dtype)`, `.half()`, ... leave alone.
    """

    def fixed_buffers(self) -> Iterable[str]:
        """Names of the buffers; none here."""
        return ()

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        names = [name for name in self.fixed_buffers() if self._buffers[name] is not None]
        dtypes = {name: self._buffers[name].dtype for name in names}
        for name in names:
            self._buffers[name] = self._buffers[name].view(torch.uint8)
        try:
            return super()._apply(fn, recurse)
        finally:
            for name, dtype in dtypes.items():
                self._buffers[name] = self._buffers[name].view(dtype)


class _Packed(FixedBuffers):
    """What both classes of packed layers share. Beside it stands `nn.Linear` or `Conv1D`."""

    packing: Packing
    #: The layer at inference and what it was made of; no part of a copy.
    ready: tuple[tuple[Source, ...], FrozenLinear] | None = None

    def fixed_buffers(self) -> Iterable[str]:
        return PARTS

    @property
    def weight(self) -> LayerWeight:
        """The weight (out, in), also where the layer stored it the other way round."""
        data, scale, offset = (self._buffers[name] for name in PARTS)
        packing, dtype = self.packing, self._buffers[SAMPLE].dtype
        if packing.format == "fp8":
            data = data.view(torch.float8_e4m3fn)
        return LayerWeight(
            data, scale, offset, packing.format, packing.group_size, packing.activation_bits,
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


class QuantizedLinear(_Packed, nn.Linear):
    """`nn.Linear` over a packed weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return self._output(input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={self.packing.format}"


class QuantizedConv1D(_Packed, Conv1D):
    """transformers' `Conv1D` (GPT-2) over a packed weight, stored (out, in)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return self._output(x)

    def __repr__(self) -> str:
        return f"QuantizedConv1D(nf={self.nf}, nx={self.nx}, weight={self.packing.format})"


QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    Conv1D: QuantizedConv1D,
}


def is_packed(module: nn.Module) -> bool:
    """Whether the layer's weight is packed."""
    return isinstance(module, _Packed)


def packed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every packed layer of `model`, each once."""
    return ((path, module) for path, module in model.named_modules() if is_packed(module))


def packed_numbers(model: nn.Module) -> int:
    """Weights of `model` that are packed, which `parameters()` does not hold."""
    return sum(module.weight.shape.numel() for _, module in packed_layers(model))


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
    # As bytes, since a tensor in fp8 does not pickle.
    data = weight.data.view(torch.uint8) if weight.format == "fp8" else weight.data
    tensors = (data, weight.scale, weight.offset)
    for name, tensor in zip(PARTS, tensors, strict=True):
        module.register_buffer(name, tensor)
    module.register_buffer(SAMPLE, taken)
    module.__class__ = cls
    del module._parameters["weight"]  # `weight` is the class's property by now


@torch.no_grad()
def sample(tensor: torch.Tensor) -> torch.Tensor:
    """At most `SAMPLES` of a tensor's numbers, spread over it, as a tensor of their own."""
    values = tensor.detach().flatten()
    step = max(1, values.numel() // SAMPLES) | 1  # odd, so as not to stay in one column
    return values[::step][:SAMPLES].clone()
