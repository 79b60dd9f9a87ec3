"""Modules that hold weights in 8 or 4 bits: buffers in the place of parameters.

The parameter `NAME` gives way to `NAME_data`, `NAME_scale`, `NAME_offset` (int4 only) and
`NAME_sample`, a few of its numbers, by which an adapter file still recognises the base.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

SAMPLES = 16


@dataclass(frozen=True)
class Packing:
    """How a module's weights are packed: `QuantizedWeight`'s options, free of tensors."""

    format: str
    group_size: int | None
    activation_bits: int | str
    makes_logits: bool = False
    #: Whether the weight was another module's too, which keeps it: one matrix became two.
    untied: bool = False


def parts_of(name: str) -> tuple[str, str, str]:
    """Buffers in the place of a parameter, in the order of `QuantizedWeight`'s tensors."""
    return f"{name}_data", f"{name}_scale", f"{name}_offset"


def sample_of(name: str) -> str:
    """The buffer that holds a few of a parameter's numbers."""
    return f"{name}_sample"


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


class Packed(FixedBuffers):
    """Mixin of the classes that modules with packed weights get."""

    packing: Packing

    def packed_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name of each parameter that gave way -> the shape that it had."""
        raise NotImplementedError

    def fixed_buffers(self) -> Iterable[str]:
        return [part for name in self.packed_shapes() for part in parts_of(name)]


def hold(
    module: nn.Module, name: str, parts: Iterable[torch.Tensor | None], taken: torch.Tensor
) -> None:
    """Give `module` the buffers that stand for its parameter `name`, which stays until dropped.

    `parts` are data, scale and offset; `taken` is the `sample` of the parameter.
    """
    data, scale, offset = parts
    if data.dtype == torch.float8_e4m3fn:  # such tensors do not pickle
        data = data.view(torch.uint8)
    for buffer, tensor in zip(parts_of(name), (data, scale, offset), strict=True):
        module.register_buffer(buffer, tensor)
    module.register_buffer(sample_of(name), taken)


def held(module: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Data, scale and offset that stand for the parameter `name`."""
    data, scale, offset = (module._buffers[part] for part in parts_of(name))
    if module.packing.format == "fp8":
        data = data.view(torch.float8_e4m3fn)
    return data, scale, offset


@torch.no_grad()
def sample(tensor: torch.Tensor) -> torch.Tensor:
    """At most `SAMPLES` of a tensor's numbers, spread over it, as a tensor of their own."""
    values = tensor.detach().flatten()
    step = max(1, values.numel() // SAMPLES) | 1  # odd, so as not to stay in one column
    return values[::step][:SAMPLES].clone()


def is_packed(module: nn.Module) -> bool:
    """Whether the module's weights are packed."""
    return isinstance(module, Packed)


def packed_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of all of `model` whose weights are packed, each once."""
    return ((path, module) for path, module in model.named_modules() if is_packed(module))


def packed_numbers(model: nn.Module) -> int:
    """Weights of `model` that are packed, which `parameters()` does not hold."""
    modules = (module for _, module in packed_modules(model))
    return sum(prod(shape) for module in modules for shape in module.packed_shapes().values())
