"""Packed weights on a GPU: accuracy, then times beside the product of the 16-bit weight.

LoRA over a base in int8, fp8 and int4, at the rows of decoding, of short prompts and of a training
step. y and the gradients are compared with fp64 over the dequantized weight: by weight only they
may err twice as much as plain torch over the dequantized weight does, in 8 bits by the rounding of
x and dY besides.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from artemis.benchmark.runner import Spread
from artemis.benchmark.timer import Timer
from artemis_kernels import QuantizedWeight, explain, lora_linear

from .gpu_accuracy import FAILURES
from .gpu_speed import captured

FORMATS = ("int8", "fp8", "int4")
RANK = 16
_ROUNDING = {"int8": 0.02, "fp8": 0.06}  # relative, of x and dY rounded row by row
Tensors = dict[str, torch.Tensor]


class Workload(NamedTuple):
    """One layer [in, out] at so many rows; `backward` means forward and all gradients."""

    rows: int
    k: int
    n: int
    backward: bool


def workloads(tiny: bool) -> Iterator[Workload]:
    """Llama 2 7B's attention and feed-forward layers: decoding first."""
    if tiny:
        yield from (Workload(1, 64, 48, False), Workload(70, 64, 48, True))
        return
    for rows, backward in ((1, False), (16, False), (64, False), (512, False), (4096, True)):
        for k, n in ((4096, 4096), (4096, 11008), (11008, 4096)):
            yield Workload(rows, k, n, backward)


def packed(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """A row for every workload, format and provider."""
    dtype = torch.float32 if tiny else torch.bfloat16
    timer = Timer(device, rounds=1 if tiny else 20)
    for work in workloads(tiny):
        torch.manual_seed(0)
        with torch.device(device):
            dense = torch.randn(work.n, work.k) / work.k**0.5
            tensors = {
                "x": torch.randn(work.rows, work.k).to(dtype),
                "lora_a": torch.randn(RANK, work.k) / work.k**0.5,
                "lora_b": torch.randn(work.n, RANK) / RANK**0.5,
            }
            dy = torch.randn(work.rows, work.n).to(dtype) if work.backward else None
        weights = {format: QuantizedWeight.quantize(dense, format) for format in FORMATS}
        rows = {f: _judged(weight, tensors, dy) for f, weight in weights.items()}
        calls = {
            f: _call(lora_linear, weight, tensors, dy)
            for f, weight in weights.items() if rows[f]["passed"]
        }  # fmt: skip
        of_tensor = dense.to(dtype)
        calls["16-bit artemis"] = _call(lora_linear, of_tensor, tensors, dy)
        calls["16-bit bare"] = _call(_bare, of_tensor, tensors, dy)
        for name, times in _times(calls, timer).items():
            rows[name] = rows.get(name, {"passed": True}) | times
        bare = rows["16-bit bare"]["ms"]["p50"]
        for name, row in rows.items():
            if "ms" in row:
                row["over_bare"] = row["ms"]["p50"] / bare
            yield {
                "kind": "packed", "provider": name, "dtype": str(dtype).removeprefix("torch."),
                **work._asdict(), **row,
            }  # fmt: skip


def _bare(x, weight, lora_a, lora_b, scale, impl=None):
    """The base alone; the low-rank tensors only get their (zero) gradients."""
    y = functional.linear(x, weight)
    return y if not lora_a.requires_grad else y + 0 * (lora_a.sum() + lora_b.sum()).to(y.dtype)


def _call(op: Callable, weight, tensors: Tensors, dy) -> Callable[[], object]:
    leaves = {n: t.detach().requires_grad_(dy is not None) for n, t in tensors.items()}
    impl = "triton" if op is lora_linear else None

    def call() -> object:
        y = op(leaves["x"], weight, leaves["lora_a"], leaves["lora_b"], 1.0, impl=impl)
        return y if dy is None else torch.autograd.grad(y, list(leaves.values()), dy)

    return call


def _outcome(weight, tensors: Tensors, dy, impl: str) -> Tensors:
    leaves = {n: t.detach().requires_grad_(dy is not None) for n, t in tensors.items()}
    y = lora_linear(weight=weight, scale=1.0, impl=impl, **leaves)
    found = {"y": y.detach()}
    if dy is not None:
        gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
        found |= dict(zip(leaves, gradients, strict=True))
    return found


def _judged(weight: QuantizedWeight, tensors: Tensors, dy) -> dict[str, Any]:
    """The path, the largest error over its limit, and the verdict."""
    path = explain("lora_linear", weight=weight, scale=1.0, impl="triton", **tensors)
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    exact = _outcome(weight.dequantize(torch.float64), doubles, dy, "reference")
    plain = _outcome(weight.dequantize(tensors["x"].dtype), tensors, dy, "reference")
    try:
        actual = _outcome(weight, tensors, dy, "triton")
    except FAILURES as error:
        return {"passed": False, "strategy": path.strategy, "where": repr(error)[:300]}
    rounding = _ROUNDING[weight.format] if path.strategy.endswith(("int8", "fp8")) else 0.0
    worst, where = 0.0, ""
    for name, truth in exact.items():
        rounded = rounding if name in ("y", "x") else 0.0
        limit = 2 * _relative(plain[name], truth) + 1e-6 + rounded
        ratio = _relative(actual[name], truth) / limit
        if not ratio <= worst:  # nan is worst
            worst, where = ratio, name
    return {"passed": worst <= 1, "strategy": path.strategy, "error": worst, "where": where}


def _relative(y: torch.Tensor, truth: torch.Tensor) -> float:
    return ((y.double() - truth).norm() / truth.norm()).item()


def _times(calls: dict[str, Callable], timer: Timer) -> dict[str, dict[str, Any]]:
    """Each call's times, of its CUDA graph where it can be captured."""
    graphs = {name: captured(call) for name, call in calls.items()} if timer.on_gpu else {}
    calls = {name: graphs.get(name) or call for name, call in calls.items()}
    return {
        name: {"ms": Spread.of(times).to_dict(5), "graph": graphs.get(name) is not None}
        for name, times in timer.interleaved(calls).items()
    }
