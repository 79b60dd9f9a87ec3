"""LoRA over a base in int8, fp8 and int4, beside the product of the 16-bit weight.

At the rows of decoding, of short prompts and of a training step.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn import functional

from artemis.benchmark import packed as of_packed
from artemis.benchmark.operations import OPERATIONS, Sizes, Tensors, Truth, operands
from artemis.benchmark.timer import Timer
from artemis_kernels import QuantizedWeight, explain

from .failures import FAILURES, Row, failure, of_each, tried

FORMATS = ("int8", "fp8", "int4")
RANK = 16
_LORA = OPERATIONS[0]
_LEARN = ("x", "lora_a", "lora_b")


class Workload(NamedTuple):
    """One layer [in, out] at so many rows; `backward` means forward and all gradients."""

    rows: int
    k: int
    n: int
    backward: bool


def workloads(tiny: bool) -> Iterator[Workload]:
    """Llama 2 7B's attention and feed-forward layers: decoding first, then training."""
    if tiny:
        yield from (Workload(1, 64, 48, False), Workload(70, 64, 48, True))
        return
    ways = ((1, False), (8192, True), (16, False), (64, False), (512, False))
    predicted = ((8192, False), (2048, False), (240, False))
    for rows, backward in ways + predicted:
        for k, n in ((4096, 4096), (4096, 11008), (11008, 4096)):
            yield Workload(rows, k, n, backward)


def packed(device: torch.device, tiny: bool, rounds: int) -> Iterator[Row]:
    """A row for every workload, format and provider; `over_bare` compares with the 16-bit one."""
    dtype = torch.float32 if tiny else torch.bfloat16
    timer = Timer(device, rounds)
    yield from of_each(
        "packed", workloads(tiny), lambda work: _measured(work, dtype, device, timer)
    )


def _measured(
    work: Workload, dtype: torch.dtype, device: torch.device, timer: Timer
) -> Iterator[Row]:
    torch.manual_seed(0)
    every = operands(_LORA, Sizes(work.rows, work.k, work.n, RANK), dtype, device)
    tensors = {name: every[name] for name in ("weight", *_LEARN)}
    weights = {
        f"artemis, {format}": QuantizedWeight.quantize(every["weight"], format)
        for format in FORMATS
    } | {"artemis, 16 bits": every["weight"]}
    rows = {name: _judged(weight, tensors, work.backward) for name, weight in weights.items()}
    runs = {n: of_packed.provider(_LORA, w, 0.0, "triton") for n, w in weights.items()}
    runs["bare"], rows["bare"] = _bare, {"passed": True}
    calls = {
        name: _call(run, tensors, work.backward, name == "bare")
        for name, run in runs.items() if rows[name]["passed"]
    }  # fmt: skip
    for name, times in timer.rows(tried(calls, rows)).items():
        rows[name] |= times
    bare = rows["bare"].get("ms")
    for name, row in rows.items():
        if "ms" in row and bare:
            row["over_bare"] = row["ms"]["p50"] / bare["p50"]
        yield {"provider": name} | row


def _bare(t: Tensors) -> torch.Tensor:
    return functional.linear(t["x"], t["weight"])


def _call(run, tensors: Tensors, backward: bool, bare: bool):
    learns = () if not backward else ("x",) if bare else _LEARN
    leaves = {n: t.detach().requires_grad_(n in learns) for n, t in tensors.items()}
    if not backward:
        return lambda: run(leaves)
    x, outputs = tensors["x"], len(tensors["weight"])
    dy = torch.randn(len(x), outputs, dtype=x.dtype, device=x.device)
    return lambda: torch.autograd.grad(run(leaves), [leaves[name] for name in learns], dy)


def _judged(weight: QuantizedWeight | torch.Tensor, tensors: Tensors, backward: bool) -> Row:
    """The path, the largest error over its limit, and the verdict."""
    given = {"scale": 1.0} | tensors | {"weight": weight}
    strategy = explain("lora_linear", **given, impl="triton").strategy
    run, learn = of_packed.provider(_LORA, weight, 0.0, "triton"), _LEARN if backward else ("x",)
    try:
        if isinstance(weight, torch.Tensor):
            verdict = Truth(_LORA, tensors, learn).judge(run)
        else:
            stands_for = {"weight": weight.dequantize(tensors["x"].dtype)}
            truth = Truth(_LORA, tensors | stands_for, learn)
            verdict = of_packed.judge(_LORA, weight, run, truth, "triton")
    except FAILURES as error:
        return {"strategy": strategy} | failure(error)
    passed = {"passed": verdict.passed, "where": verdict.where}
    return {"strategy": strategy, "error": verdict.ratio} | passed
