"""`frozen_linear`, by which adapted layers decode, against the operation it stands for, in fp64.

Constants are made as a model makes them, over a base in 16 bits and in every packed format; the
path is the one that the library takes.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from artemis.benchmark.operations import (
    OPERATIONS,
    Operation,
    Sizes,
    Tensors,
    Verdict,
    operands,
    relative_error,
)
from artemis_kernels import FrozenAdapter, QuantizedWeight, explain, frozen_linear

from .failures import FAILURES, failure

#: What the base is held in; each has a process of its own.
BASES = ("tensor", "int8", "fp8", "int4")
_ROUNDING = {"int8": 0.02, "fp8": 0.06}  # relative, of rows multiplied in 8 bits
_LORA, _ADAPTER, _ = OPERATIONS


def check(base: str, device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """A row for every dtype, number of rows and adapter: decoding, a batch of it, a prompt."""
    dtypes = (torch.float32, torch.float16) if tiny else (torch.bfloat16, torch.float16)
    for dtype in dtypes:
        for rows in (1, 20) if tiny else (1, 16, 512):
            k, n = (64, 96) if tiny else (4096, 4096)
            for operation, r in ((_LORA, 16), (_ADAPTER, 64)):
                yield _check_case(operation, base, Sizes(rows, k, n, r), dtype, device)


def _check_case(
    operation: Operation, base: str, sizes: Sizes, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    of = "lora" if operation is _LORA else "bottleneck"
    row = {
        "kind": "accuracy", "op": "frozen_linear", "strategy": f"{of} over {base}",
        "dtype": str(dtype).removeprefix("torch."), "sizes": sizes._asdict(), "dropout": 0.0,
    }  # fmt: skip
    try:
        torch.manual_seed(0)
        tensors = operands(operation, sizes, dtype, device)
        return row | _judged(operation, base, tensors).to_dict()
    except FAILURES as error:
        return row | {"ratio": None} | failure(error)


def _judged(operation: Operation, base: str, tensors: Tensors) -> Verdict:
    """The error over twice that of the reference in the same dtype; `where` is the path."""
    x, weight = tensors["x"], tensors["weight"]
    exactly = weight.double()
    if base != "tensor":
        weight = QuantizedWeight.quantize(weight, base)
        exactly = weight.dequantize(torch.float64)
    doubles = {name: tensor.double() for name, tensor in tensors.items()} | {"weight": exactly}
    exact = operation.public(doubles, impl="reference")
    plain = operation.public(tensors | {"weight": exactly.to(x.dtype)}, impl="reference")
    adapter = _adapter(operation, tensors, weight)
    found = frozen_linear(x, weight, adapter, impl="triton")
    path = explain("frozen_linear", x, weight, adapter, impl="triton").strategy
    rounding = next((r for end, r in _ROUNDING.items() if path.endswith(end)), 0.0)
    limit = 2 * relative_error(plain, exact) + 1e-6 + rounding
    ratio = relative_error(found, exact) / limit
    return Verdict(ratio if math.isfinite(ratio) else None, path)


def _adapter(
    operation: Operation, t: Tensors, weight: torch.Tensor | QuantizedWeight
) -> FrozenAdapter:
    if operation is _LORA:
        return FrozenAdapter.lora(t["lora_a"], t["lora_b"], t["scale"], bias=t["bias"])
    given = {name: t[name] for name in ("down", "up", "bias", "bias_down", "bias_up", "scale")}
    return FrozenAdapter.bottleneck(weight, **given)
