"""A case with operands: the call that is timed, by any strategy, over weights that go round."""

from dataclasses import replace

import torch

from ..core.frozen import FewRows, FrozenAdapter
from ..core.quantized import QuantizedWeight
from ..core.strategies import FROZEN, TENSOR, Case
from ..ops.adapter_linear import op as adapter_linear
from ..ops.bottleneck_adapter import op as bottleneck_adapter
from ..ops.frozen_linear import op as frozen_linear
from ..ops.lora_linear import op as lora_linear
from ..ops.quantized_linear import op as quantized_linear

_MODULES = (lora_linear, adapter_linear, bottleneck_adapter, quantized_linear, frozen_linear)
_OPERATIONS = {module.NAME: module for module in _MODULES}
_PAST_THE_CACHE = 1 << 27  # bytes of weights to go round
_MOST_WEIGHTS = 16
_DROPOUT = 0.1
_ON_INPUT = (lora_linear.NAME, FROZEN + "lora", FROZEN + "folded")  # whose first factor reads x


def module_of(op: str):
    """Where the operation of a case is defined."""
    return _OPERATIONS[op.partition(":")[0]]


class Workload:
    """Operands of a case on a device; adapters are fp32 and biases are those of a bottleneck."""

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device
        self.impl = "eager" if device.type == "cpu" else "triton"
        _, m, k, n, r = case[:5]
        dtype = case.torch_dtype
        self.weights = self._weights(dtype)
        columns = k or n
        self.x = torch.randn(m, columns, dtype=dtype, device=device)
        self.dy = torch.randn(m, n, dtype=dtype, device=device)
        first = k if case.op in _ON_INPUT else n
        down = torch.randn(r, first, device=device) / max(first, 1) ** 0.5
        up = torch.randn(n, r, device=device) / max(r, 1) ** 0.5
        biases = torch.zeros(r, device=device), torch.zeros(n, device=device)
        self.small = (down, up, *biases)
        if case.op.startswith(FROZEN):
            self._freeze(*self.small)
        self.learning = [self.x]
        if case.op != quantized_linear.NAME and not case.op.startswith(FROZEN):
            self.learning += self.small[: 2 if case.op == lora_linear.NAME else 4]
        for tensor in self.learning:
            tensor.requires_grad_(case.trains)
        self.dropout = (0.0, None)
        if case.drops:
            self.dropout = (_DROPOUT, torch.zeros(1, dtype=torch.int64, device=device))

    def usual(self) -> str:
        """The strategy that costs choose."""
        module = module_of(self.case.op)
        return module.usual(self.case, self.impl, self.weights[0], self.device)[0]

    def run(self, strategy: str, turn: int) -> None:
        """The forward, or forward and backward, with the weight of this turn."""
        forward = self._frozen if self.case.op.startswith(FROZEN) else self._forward
        with torch.set_grad_enabled(self.case.trains):
            y = forward(strategy, self.weights[turn % len(self.weights)])
            if self.case.trains:
                torch.autograd.grad(y, self.learning, self.dy)

    def _forward(self, strategy: str, weight) -> torch.Tensor:
        down, up, bias_down, bias_up = self.small
        x, dropout, path = self.x, self.dropout, (self.impl, strategy)
        operator = getattr(torch.ops.artemis, self.case.op)
        hidden = (1.0, None, "gelu", *dropout, *path)
        if self.case.op == bottleneck_adapter.NAME:
            return operator(x, down, up, bias_down, bias_up, None, *hidden)
        packed = isinstance(weight, QuantizedWeight)
        data = weight.data if packed else weight
        parts = (weight.scale, weight.offset) if packed else ()
        if self.case.op == lora_linear.NAME:
            return operator(x, data, down, up, None, 1.0, None, *dropout, *path, *parts)
        if self.case.op == quantized_linear.NAME:
            return operator(x, data, None, *path, *parts)
        return operator(x, data, down, up, None, bias_down, bias_up, *hidden, *parts)

    def _freeze(self, down, up, bias_down, bias) -> None:
        """Constants in x's dtype, and what `FrozenLinear` holds for few rows, of each weight."""
        down, up, bias_down, bias = (t.to(self.x.dtype) for t in (down, up, bias_down, bias))
        if self.case.op == FROZEN + "lora":
            self.adapter = FrozenAdapter(down, up, bias)
        else:
            plain = self.case.op == FROZEN + "plain"
            self.adapter = FrozenAdapter(down, up, bias, bias_down, 1.0, "gelu", plain)
        self._few_rows: dict[int, FewRows] = {}

    def _frozen(self, strategy: str, weight) -> torch.Tensor:
        if not strategy.startswith("one_call"):
            return frozen_linear.computed(self.x, weight, self.adapter, self.impl, strategy)
        if id(weight) not in self._few_rows:  # in the round that warms up
            self._few_rows[id(weight)] = FewRows(weight, self.adapter)
        return self._few_rows[id(weight)](self.x)

    def _weights(self, dtype: torch.dtype) -> list[torch.Tensor | QuantizedWeight | None]:
        case = self.case
        if not case.in_features:
            return [None]
        first = torch.randn(case.out_features, case.in_features, device=self.device)
        first /= case.in_features**0.5
        if case.format == TENSOR:
            first = first.to(dtype)
            return [first, *(first.clone() for _ in range(_count(first.nbytes) - 1))]
        bits = case.bits if case.bits == "auto" else int(case.bits)
        first = QuantizedWeight.quantize(first, case.format, activation_bits=bits)
        return [first, *(_copied(first) for _ in range(_count(first.nbytes) - 1))]


def _count(nbytes: int) -> int:
    return min(_MOST_WEIGHTS, max(2, _PAST_THE_CACHE // max(1, nbytes)))


def _copied(weight: QuantizedWeight) -> QuantizedWeight:
    offset = None if weight.offset is None else weight.offset.clone()
    return replace(weight, data=weight.data.clone(), scale=weight.scale.clone(), offset=offset)
