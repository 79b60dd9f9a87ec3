"""Modules of experts whose matrices are held in 8 or 4 bits, under the very same module path.

Like a linear layer's, their class is set: a subclass of theirs, made for each class when it is
first wanted, so that they keep what they know of activations and gates. Each of their two
parameters gives way to buffers (packed.py) of one more dimension than a matrix's, the experts.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from torch import nn

from artemis_kernels import quantized_linear

from ..experts import bias_of, expert_output, matrices_of
from .expert_weights import ExpertWeights
from .packed import Packed, Packing, held, hold, sample_of
from .routing import Routing


class _Weights:
    """A parameter that gave way, read as `ExpertWeights`; where there was none, there is none."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, module: nn.Module | None, owner: type) -> ExpertWeights:
        if module is None or sample_of(self._name) not in module._buffers:
            raise AttributeError(self._name)
        packing, (data, scale, offset) = module.packing, held(module, self._name)
        group_size = None if offset is None else 2 * data.shape[-1] // scale.shape[-1]
        return ExpertWeights(
            data, scale, offset, packing.format, group_size, packing.activation_bits,
            module._buffers[sample_of(self._name)].dtype,
        )  # fmt: skip

    def __set__(self, module: nn.Module, value: object) -> None:
        raise AttributeError(f"{self._name} is packed, and stays so")


class QuantizedExperts(Packed):
    """Mixin over a class of experts: they compute from packed matrices, one after the other."""

    #: The class that the module had.
    plain: type[nn.Module]

    gate_up_proj, up_proj, down_proj = _Weights(), _Weights(), _Weights()

    def packed_shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes = {name: tuple(getattr(self, name).shape) for name in matrices_of(self)}
        if self.is_transposed:
            shapes = {name: (count, i, o) for name, (count, o, i) in shapes.items()}
        return shapes

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [tokens, in], the others [tokens, choices] -> [tokens, out]."""
        routing = Routing.of(top_k_index, self.num_experts)
        *own, nobodys = routing.rows(hidden_states).split(routing.counts)
        layers = [self._layer(name) for name in matrices_of(self)]
        busy = [expert for expert, rows in enumerate(own) if len(rows)] or [0]
        outputs = [
            expert_output(self, own[expert], *(partial(layer, expert) for layer in layers))
            for expert in busy
        ]
        if len(nobodys):
            outputs.append(outputs[0].new_zeros(len(nobodys), outputs[0].shape[1]))
        return routing.sums(torch.cat(outputs), top_k_weights).to(hidden_states.dtype)

    def _layer(self, name: str) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """The product of some rows with one expert's matrix, plus its bias."""
        weights: ExpertWeights = getattr(self, name)
        return lambda expert, x: quantized_linear(
            x, weights[expert], bias=bias_of(self, name, expert)
        )

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, weight={self.packing.format}"

    def __reduce__(self) -> tuple:
        return _empty, (self.plain,), self.__getstate__()


@cache
def packed_class(plain: type[nn.Module]) -> type[nn.Module]:
    """`plain`, a class of experts, over packed matrices.

    How many rows an expert gets is known only when it computes: it runs outside compiled graphs.
    """
    forward = torch.compiler.disable(QuantizedExperts.forward)
    members = {"plain": plain, "forward": forward, "__module__": plain.__module__}
    return type(f"Quantized{plain.__name__}", (QuantizedExperts, plain), members)


def _empty(plain: type[nn.Module]) -> nn.Module:
    """A packed module that is about to get its attributes."""
    cls = packed_class(plain)
    return cls.__new__(cls)


def pack_experts(
    module: nn.Module, weights: Mapping[str, tuple[ExpertWeights, torch.Tensor]]
) -> None:
    """Turn a module of experts into its packed class.

    `weights`: name of each parameter that gives way -> what it becomes, and its `sample`.
    Interrupted at any line, the module computes, as what it was or as what it becomes.
    """
    (one, _), *_ = weights.values()
    module.packing = Packing(one.format, None, one.activation_bits)  # scales tell group sizes
    for name, (weight, taken) in weights.items():
        hold(module, name, (weight.data, weight.scale, weight.offset), taken)
    module.__class__ = packed_class(type(module))
    for name in weights:
        del module._parameters[name]  # by now the class reads it from the buffers
