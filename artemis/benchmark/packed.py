"""The operations over weights in 8 and 4 bits, as a benchmark sees them.

Truth is the same operation over the weight that the packed one stands for. What multiplies in 8
bits may err by the rounding of x and dY besides.
"""

import math

import torch

from artemis_kernels import QuantizedWeight, explain

from .operations import SEED, Operation, Tensors, Truth, Verdict, outcome, relative_error
from .peers import Run

_PREFIX = "artemis, "
_ROUNDING = {"int8": 0.02, "fp8": 0.06, "int4": 0.0}  # relative, of rows rounded one by one
_EXACT = ("lora_a", "lora_b")  # gradients that no product of the packed weight goes into


def quantized(tensors: Tensors) -> dict[str, QuantizedWeight]:
    """Provider's name -> the packed weight; every format on a GPU, int8 and int4 on a CPU."""
    weight = tensors.get("weight")
    if weight is None:
        return {}
    formats = ("int8", "fp8", "int4") if weight.device.type == "cuda" else ("int8", "int4")
    return {_PREFIX + format: QuantizedWeight.quantize(weight, format) for format in formats}


def provider(
    operation: Operation, weight: QuantizedWeight, dropout: float, impl: str | None = None
) -> Run:
    """The public operation over `weight`, whatever weight it is called with."""

    def run(t: Tensors) -> torch.Tensor:
        return operation.public(t | {"weight": weight}, dropout_p=dropout, seed=SEED, impl=impl)

    return run


def judge(
    operation: Operation, weight: QuantizedWeight, run: Run, truth: Truth, impl: str | None = None
) -> Verdict:
    """Relative errors of y and the gradients, each over its limit, for a truth over a tensor.

    The limit is twice plain torch's error over the weight that `weight` stands for, and the
    rounding.
    """
    given = {"scale": 1.0} | truth.tensors | {"weight": weight}
    strategy = explain(operation.name, **given, impl=impl).strategy
    rounding = _ROUNDING[weight.format] if strategy.endswith(("int8", "fp8")) else 0.0
    verdicts = []
    for name, found in outcome(run, truth.tensors, truth.wanted, truth.dy).items():
        exact, plain = truth.exact[name], relative_error(truth.plain[name], truth.exact[name])
        limit = 2 * plain + 1e-6 + (0.0 if name in _EXACT else rounding)
        error = relative_error(found, exact) if found.isfinite().all() else math.inf
        verdicts.append(Verdict(error / limit if math.isfinite(error) else None, name))
    return max(verdicts, key=lambda v: math.inf if v.ratio is None else v.ratio)
