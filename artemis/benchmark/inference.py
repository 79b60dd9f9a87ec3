"""The operations as generation runs them: a layer's constants made once, then one call."""

import torch

from artemis_kernels import Choice, FrozenAdapter, FrozenLinear, QuantizedWeight, explain

from .operations import Operation, Tensors

FROZEN = ", frozen"  # the end of a provider's name


class AtInference:
    """A layer with its adapter in `tensors`; a call takes x alone from what it is given."""

    def __init__(
        self,
        operation: Operation,
        tensors: Tensors,
        weight: torch.Tensor | QuantizedWeight,
        impl: str | None = None,
    ) -> None:
        if operation.name == "lora_linear":
            adapter = FrozenAdapter.lora(tensors["lora_a"], tensors["lora_b"])
        else:
            adapter = FrozenAdapter.bottleneck(weight, tensors["down"], tensors["up"])
        self.linear = FrozenLinear(weight, adapter, impl=impl)

    def __call__(self, given: Tensors) -> torch.Tensor:
        return self.linear(given["x"])

    def choice(self, x: torch.Tensor) -> Choice:
        """What `frozen_linear` says of such a call."""
        linear = self.linear
        return explain("frozen_linear", x, linear.weight, linear.adapter, impl=linear.impl)


def at_inference(
    operation: Operation,
    tensors: Tensors,
    weights: dict[str, QuantizedWeight],
    impl: str | None = None,
) -> dict[str, AtInference]:
    """A provider beside `artemis` and beside each of `weights`; none for what has no weight."""
    if "weight" not in tensors:
        return {}
    held = {"artemis": tensors["weight"], **weights}
    return {n + FROZEN: AtInference(operation, tensors, w, impl) for n, w in held.items()}


def weight_of(name: str, weights: dict[str, QuantizedWeight]) -> QuantizedWeight | None:
    """The packed weight of a provider; None where it has a tensor."""
    return weights.get(name.removesuffix(FROZEN))
