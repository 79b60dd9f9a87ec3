"""Operations over a packed weight: forced along a strategy, and in 8 bits their truth in fp64."""

import torch

from artemis_kernels import QuantizedWeight
from artemis_kernels.ops.bottleneck_adapter.reference import bottleneck_adapter
from tests import kit
from tests.kit import Sizes
from tests.ops.operations import DOUBLE, LORA


def forced(operation, strategy, packed: QuantizedWeight, impl: str = "eager"):
    """The operation along `strategy`, its own choice set aside, over `packed`."""

    def run(x, **arguments):
        scale = arguments.pop("scale", 1.0)
        scale = (1.0, scale) if isinstance(scale, torch.Tensor) else (scale, None)
        names = ("lora_a", "lora_b", "bias") if operation is LORA else (
            "down", "up", "bias", "bias_down", "bias_up"
        )  # fmt: skip
        kind = () if operation is LORA else (arguments.get("activation", "gelu"),)
        return getattr(torch.ops.artemis, operation.name)(
            x, packed.data, *(arguments.get(name) for name in names), *scale, *kind, 0.0, None,
            impl, strategy, packed.scale, packed.offset,
        )  # fmt: skip

    return run


def operands(operation, sizes: Sizes, dtype, format="int8") -> tuple[kit.Tensors, QuantizedWeight]:
    tensors = operation.operands(sizes, dtype)
    return tensors, QuantizedWeight.quantize(tensors.pop("weight"), format)


def trained(operation) -> list[str]:
    return list(operation.trained)


def rounded(v: torch.Tensor, format: str = "int8") -> torch.Tensor:
    """v [M, K] in fp64 as the 8-bit product sees it.

    fp8: rows on e4m3 numbers; int8: rows on 255 levels, large columns untouched.
    """
    if format == "fp8":
        step = v.abs().amax(1, keepdim=True) / 448
        codes = v / torch.where(step == 0, 1, step)
        return codes.float().to(torch.float8_e4m3fn).double() * step
    largest = v.abs().amax(0)
    order = largest.argsort(descending=True)[: max(1, v.shape[1] // 64)]
    apart = order[largest[order] > 4 * largest.median()] if v.shape[1] > 1 else order[:0]
    rest = v.clone()
    rest[:, apart] = 0
    step = rest.abs().amax(1, keepdim=True) / 127
    result = (rest / torch.where(step == 0, 1, step)).round() * step
    result[:, apart] = v[:, apart]
    return result


def truth_in_eight_bits(operation, strategy, packed, tensors, dy) -> kit.Tensors:
    """y and the gradients in fp64: the base product and dX rounded, the adapter on unrounded x."""
    t = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    weight, row = packed.dequantize(DOUBLE), packed.scale.double()
    x = rounded(t["x"].detach(), packed.format)
    y0 = (x @ weight.t() + t["bias"].detach()).requires_grad_()
    if operation is LORA:
        y = y0 + t["scale"] * (t["x"] @ t["lora_a"].t()) @ t["lora_b"].t()
    elif strategy == "plain":
        y = bottleneck_adapter(
            y0, t["down"], t["up"], t["scale"], t["bias_down"], t["bias_up"], None, "gelu"
        )
    else:
        exact = t["x"] @ weight.t() + t["bias"]
        y = y0 + bottleneck_adapter(
            exact, t["down"], t["up"], t["scale"], t["bias_down"], t["bias_up"],
            torch.zeros_like(exact), "gelu",
        )  # fmt: skip
    y.backward(dy.double())
    through = rounded(y0.grad * row, packed.format) / row @ weight
    zero = torch.zeros(())
    gradients = {name: zero if t[name].grad is None else t[name].grad for name in operation.trained}
    gradients["x"] = gradients["x"] + through
    gradients["bias"] = gradients["bias"] + y0.grad.sum(0)
    return {"y": y.detach(), **gradients}
