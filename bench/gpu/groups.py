"""Layers that read one x (q, k and v; gate and up) as one operation, beside one by one and PEFT."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from artemis.benchmark.operations import SEED, Sizes, relative_error
from artemis.benchmark.peers import HAS_PEFT, peft_layer
from artemis.benchmark.timer import Timer
from artemis_kernels import adapter_linear, adapter_linear_group, lora_linear, lora_linear_group

from .failures import FAILURES, Row, failure, of_each, tried

Ys = Sequence[torch.Tensor]


class Workload(NamedTuple):
    """Layers [k, n] of one x [rows, k]; `members`: `lora` or `bottleneck`, of rank or width r."""

    members: str
    rows: int
    k: int
    outs: tuple[int, ...]
    r: int
    dropout: float


def workloads(tiny: bool) -> Iterator[Workload]:
    """q, k, v and gate, up of Llama 3 8B, 70B and Llama 2 7B; trained, forward and all gradients.

    Bottlenecks are folded at these sizes: the group shares its shrink and its sum over x.
    """
    if tiny:
        yield Workload("lora", 24, 32, (48, 16, 16), 8, 0.1)
        yield Workload("bottleneck", 24, 32, (48, 40), 8, 0.1)
        return
    for dropout in (0.0, 0.1):
        yield Workload("lora", 8192, 4096, (4096, 1024, 1024), 16, dropout)
        yield Workload("lora", 8192, 4096, (4096, 4096, 4096), 16, dropout)
    for dropout in (0.0, 0.1):
        yield Workload("bottleneck", 8192, 4096, (11008, 11008), 64, dropout)
    for rows, k in ((1024, 4096), (8192, 8192), (1024, 8192)):  # Llama 3 8B and 70B
        for dropout in (0.1, 0.0):
            yield Workload("lora", rows, k, (k, 1024, 1024), 16, dropout)


class Operands(NamedTuple):
    """One x, and lists over the members: weights, first and second factors."""

    x: torch.Tensor
    weights: list[torch.Tensor]
    first: list[torch.Tensor]
    second: list[torch.Tensor]

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [self.x, *self.first, *self.second]

    def to(self, dtype: torch.dtype) -> "Operands":
        """The same anew; all but the weights require a gradient."""
        lists = (
            [t.detach().to(dtype).requires_grad_(place != 0) for t in tensors]
            for place, tensors in enumerate(self[1:])
        )
        return Operands(self.x.detach().to(dtype).requires_grad_(), *lists)


def groups(device: torch.device, tiny: bool, rounds: int) -> Iterator[Row]:
    """A row for every workload and provider; `over_joined` compares with the group."""
    dtype = torch.float32 if tiny else torch.bfloat16
    timer = Timer(device, rounds)
    yield from of_each("group", workloads(tiny), lambda work: _measured(work, dtype, device, timer))


def _measured(
    work: Workload, dtype: torch.dtype, device: torch.device, timer: Timer
) -> Iterator[Row]:
    torch.manual_seed(0)
    with torch.device(device):
        given = _operands(work).to(dtype)
        dys = [torch.randn(work.rows, n).to(dtype) for n in work.outs]
    ways = _ways(work, given)
    rows = _checked(work, given, dys, ways)
    calls = {
        name: _call(way, given, dys, given.leaves if name != "bare" else [given.x])
        for name, way in ways.items()
        if rows[name]["passed"]
    }
    for name, times in timer.rows(tried(calls, rows)).items():
        rows[name] |= times
    joined = rows["artemis, group"].get("ms")
    for name, row in rows.items():
        if "ms" in row and joined:
            row["over_joined"] = row["ms"]["p50"] / joined["p50"]
        yield {"provider": name} | row


def _operands(work: Workload) -> Operands:
    """A bottleneck's first factor reads the layer's output, LoRA's its input."""
    k, r = work.k, work.r
    inner = [k if work.members == "lora" else n for n in work.outs]
    return Operands(
        torch.randn(work.rows, k),
        [torch.randn(n, k) / k**0.5 for n in work.outs],
        [torch.randn(r, i) / i**0.5 for i in inner],
        [torch.randn(n, r) / r**0.5 for n in work.outs],
    )


def _artemis(work: Workload, o: Operands, joined: bool, impl: str = "triton") -> Ys:
    options = {"dropout_p": work.dropout, "seed": SEED, "impl": impl}
    each = list(zip(o.weights, o.first, o.second, strict=True))
    scales = [1.0] * len(each)
    if work.members == "lora":
        if joined:
            return lora_linear_group(o.x, o.weights, o.first, o.second, scales, **options)
        return [lora_linear(o.x, *member, 1.0, **options) for member in each]
    if joined:
        return adapter_linear_group(o.x, o.weights, o.first, o.second, scales=scales, **options)
    return [adapter_linear(o.x, *member, **options) for member in each]


def _ways(work: Workload, given: Operands) -> dict[str, Callable]:
    ways: dict[str, Callable[[Operands], Ys]] = {
        "artemis, group": lambda o: _artemis(work, o, joined=True),
        "artemis, one by one": lambda o: _artemis(work, o, joined=False),
        "bare": lambda o: [functional.linear(o.x, weight) for weight in o.weights],
    }
    if work.members == "lora" and HAS_PEFT:
        layers = [
            peft_layer(Sizes(work.rows, work.k, n, work.r), work.dropout, weight)
            for n, weight in zip(work.outs, given.weights, strict=True)
        ]
        ways["peft"] = lambda o: [
            layer({"x": o.x, "lora_a": a, "lora_b": b})
            for layer, a, b in zip(layers, o.first, o.second, strict=True)
        ]
    return ways


def _call(way: Callable[[Operands], Ys], given: Operands, dys: Ys, leaves: list[torch.Tensor]):
    return lambda: torch.autograd.grad(way(given), leaves, dys)


def _checked(work: Workload, given: Operands, dys: Ys, ways: dict[str, Callable]) -> dict[str, Row]:
    """Largest error over its limit: twice the reference's in the same dtype, ys and gradients.

    Peers draw masks of their own and are not checked here: `operations` checks the same layers.
    """
    exact = _outcome(lambda o: _artemis(work, o, False, "reference"), given, torch.float64, dys)
    plain = _outcome(lambda o: _artemis(work, o, False, "reference"), given, given.x.dtype, dys)
    rows: dict[str, Row] = {}
    for name, way in ways.items():
        if not name.startswith("artemis"):
            rows[name] = {"passed": True}
            continue
        try:
            found = _outcome(way, given, given.x.dtype, dys)
        except FAILURES as broken:
            rows[name] = failure(broken)
            continue
        ratios = [
            relative_error(f, e) / (2 * relative_error(p, e) + 1e-6)
            for f, e, p in zip(found, exact, plain, strict=True)
        ]
        worst = max(ratios)
        rows[name] = {"passed": all(ratio <= 1 for ratio in ratios), "error": worst}
    return rows


def _outcome(way: Callable[[Operands], Ys], given: Operands, dtype: torch.dtype, dys: Ys) -> list:
    operands = given.to(dtype)
    ys = way(operands)
    gradients = torch.autograd.grad(ys, operands.leaves, [dy.to(dtype) for dy in dys])
    return [*(y.detach() for y in ys), *gradients]
