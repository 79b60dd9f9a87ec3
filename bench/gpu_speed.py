"""Operations beside their peers on real layer shapes: the times of `bench.gpu`.

Peers are plain torch, `addmm` by hand, PEFT's layer where it is installed, and the bare product of
the frozen layer, below which none can go. Nothing is timed that fails the accuracy rule (a peer
draws dropout masks of its own, and is checked without).
"""

import importlib.util
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

import artemis_kernels
from artemis_kernels import Choice, Cost

from . import gpu_accuracy
from .gpu_accuracy import FAILURES, OPERATIONS, SEED, Operation, Sizes, Tensors, Truth
from .peaks import gpu_peaks
from .runner import Spread

_FLUSHED_BYTES = 1 << 28  # written before each call, so that inputs come from memory, not the L2
_HAS_PEFT = importlib.util.find_spec("peft") is not None
_BOTTLENECK = ("x", "down", "up")
_SIDES = {  # no bias is timed, and the scale is a constant 1
    "lora_linear": ("x", "lora_a", "lora_b"),
    "adapter_linear": _BOTTLENECK,
    "bottleneck_adapter": _BOTTLENECK,
}
Run = Callable[[Tensors], torch.Tensor]


class Workload(NamedTuple):
    """An operation on one layer; `backward` means forward and all gradients but the weight's."""

    operation: Operation
    sizes: Sizes
    dropout: float
    backward: bool


def workloads(tiny: bool) -> Iterator[Workload]:
    """Layers of Llama 3.2 1B and 3.1 8B: a training step's 4,096 rows first, then one and 16."""
    lora, adapter, bottleneck = OPERATIONS
    if tiny:
        layers, blocks, training, few = ((32, 48),), ((32, 8),), 16, ()
    else:
        layers = ((4096, 4096), (4096, 14336), (14336, 4096), (2048, 2048))
        blocks, training, few = ((4096, 64), (2048, 64)), 4096, (1, 16)
    for dropout, backward in ((0.1, True), (0.0, False), (0.0, True))[: 2 if tiny else 3]:
        for k, n in layers:
            yield Workload(lora, Sizes(training, k, n, 8 if tiny else 16), dropout, backward)
        if dropout or not backward:
            for k, n in layers[:3]:
                yield Workload(adapter, Sizes(training, k, n, 8 if tiny else 64), dropout, backward)
            for k, width in blocks:
                yield Workload(bottleneck, Sizes(training, k, k, width), dropout, backward)
    for rows in few:
        yield Workload(lora, Sizes(rows, 4096, 4096, 16), 0.0, False)
        yield Workload(adapter, Sizes(rows, 4096, 14336, 64), 0.0, False)


def plain(operation: Operation, dropout: float) -> Run:
    """The operation as one would write it."""

    def lora(t: Tensors) -> torch.Tensor:
        s = functional.linear(functional.dropout(t["x"], dropout), t["lora_a"])
        return functional.linear(t["x"], t["weight"]) + functional.linear(s, t["lora_b"])

    def bottleneck(t: Tensors) -> torch.Tensor:
        y = functional.linear(t["x"], t["weight"]) if "weight" in t else t["x"]
        h = functional.dropout(functional.gelu(functional.linear(y, t["down"])), dropout)
        return y + functional.linear(h, t["up"])

    return lora if operation.name == "lora_linear" else bottleneck


def addmm(operation: Operation, dropout: float) -> Run:
    """The same with the branch's last product and its sum in one call."""

    def lora(t: Tensors) -> torch.Tensor:
        s = functional.dropout(t["x"], dropout) @ t["lora_a"].t()
        return torch.addmm(t["x"] @ t["weight"].t(), s, t["lora_b"].t())

    def bottleneck(t: Tensors) -> torch.Tensor:
        y = t["x"] @ t["weight"].t() if "weight" in t else t["x"]
        h = functional.dropout(functional.gelu(y @ t["down"].t()), dropout)
        return torch.addmm(y, h, t["up"].t())

    return lora if operation.name == "lora_linear" else bottleneck


def peft_layer(sizes: Sizes, dropout: float, weight: torch.Tensor) -> Run:
    """PEFT's LoRA layer, its adapter in the weight's dtype; takes the given A and B."""
    from peft import LoraConfig, inject_adapter_in_model

    base = nn.Linear(sizes.k, sizes.n, bias=False, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(r=sizes.r, lora_alpha=sizes.r, lora_dropout=dropout, target_modules=["0"])
    model = inject_adapter_in_model(config, nn.Sequential(base)).to(weight).train()
    a, b = (adapters["default"] for adapters in (model[0].lora_A, model[0].lora_B))

    def run(t: Tensors) -> torch.Tensor:
        for layer, name in ((a, "lora_a"), (b, "lora_b")):
            layer.weight = t[name]  # the same leaf that the other providers get
        return model(t["x"])

    for layer in (a, b):
        del layer.weight  # so that a plain tensor may take its place
    return run


def chosen(work: Workload, tensors: Tensors) -> Choice:
    """The path that the public function takes."""
    return artemis_kernels.explain(
        work.operation.name, **{"scale": 1.0} | tensors, dropout_p=work.dropout, impl="triton"
    )


def providers(work: Workload, tensors: Tensors, dropout: float) -> dict[str, Run]:
    """Name -> run; `artemis` is the public function, `artemis/S` another strategy S, forced."""
    operation, strategy_taken = work.operation, chosen(work, tensors).strategy
    found: dict[str, Run] = {
        "artemis": lambda t: operation.public(t, dropout_p=dropout, seed=SEED, impl="triton"),
        "plain": plain(operation, dropout),
        "addmm": addmm(operation, dropout),
    }
    if "weight" in tensors:
        found["bare"] = lambda t: functional.linear(t["x"], t["weight"])
    if operation.name == "lora_linear" and _HAS_PEFT:
        found["peft"] = peft_layer(work.sizes, dropout, tensors["weight"])
    for strategy in operation.strategies:
        if strategy != strategy_taken and not (strategy == "one_pass" and work.dropout):
            found[f"artemis/{strategy}"] = lambda t, s=strategy: operation.forced(s, t, dropout)
    return found


def cost(work: Workload, provider: str, forward: Cost, itemsize: int) -> Cost:
    """What must be computed and moved. Backward: dX of the base, each thin product twice; dY and
    what the forward read are read once, dX and the adapter's gradients written once."""
    m, k, n, r = work.sizes
    has_weight = work.operation.name != "bottleneck_adapter"
    base = 2 * m * k * n * has_weight
    if provider == "bare":
        times = 1 + work.backward
        return Cost(times * base, times * itemsize * (m * k + k * n + m * n))
    if not work.backward:
        return forward
    adapter = r * (k + n)
    moved = m * n + k * n * has_weight + 2 * m * k + 2 * adapter
    return forward + Cost(base + 2 * (forward.flops - base), itemsize * moved)


def kernels(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """Peaks, then a row for every workload and provider."""
    dtype = torch.float32 if tiny else torch.bfloat16
    timer = Timer(device, rounds=1 if tiny else 20)
    rate, bandwidth = gpu_peaks(device, dtype, timer.best)
    yield {"kind": "peaks", "tflops": rate / 1e12, "gbs": bandwidth / 1e9}
    for work in workloads(tiny):
        torch.manual_seed(0)
        shown = {
            "op": work.operation.name, "dtype": str(dtype).removeprefix("torch."),
            "sizes": work.sizes._asdict(), "dropout": work.dropout, "backward": work.backward,
        }  # fmt: skip
        every = gpu_accuracy.operands(work.operation, work.sizes, dtype, device)
        names = ("weight", *_SIDES[work.operation.name])
        tensors = {name: every[name] for name in names if name in every}
        choice = chosen(work, tensors)
        rows = _checked(work, tensors)
        _time(work, tensors, {name: row for name, row in rows.items() if row["passed"]}, timer)
        peers = [
            rows[n]["ms"]["p50"] for n in ("plain", "addmm", "peft") if "ms" in rows.get(n, {})
        ]
        for name, row in rows.items():
            if "ms" in row:
                seconds = row["ms"]["p50"] / 1e3
                needed = cost(work, name, choice.cost, dtype.itemsize)
                floor = max(needed.flops / rate, needed.bytes / bandwidth)
                row |= {
                    "tflops": needed.flops / seconds / 1e12, "gbs": needed.bytes / seconds / 1e9,
                    "over_floor": seconds / floor,
                    "over_best_peer": row["ms"]["p50"] / min(peers) if peers else None,
                }  # fmt: skip
            if name == "artemis":
                row["strategy"] = choice.strategy
            yield {"kind": "kernel", **shown, "provider": name, **row}


def _checked(work: Workload, tensors: Tensors) -> dict[str, dict[str, Any]]:
    """Error and verdict of every provider; y only for a forward, gradients too for a backward."""
    wanted = _SIDES[work.operation.name] if work.backward else ("x",)
    truths = {p: Truth(work.operation, tensors, wanted, dropout_p=p) for p in {0.0, work.dropout}}
    rows: dict[str, dict[str, Any]] = {}
    for name, run in providers(work, tensors, work.dropout).items():
        dropout = work.dropout if name.startswith("artemis") else 0.0
        if name == "bare":
            rows[name] = {"passed": True}
            continue
        if dropout != work.dropout:
            run = providers(work, tensors, dropout)[name]
        truth = truths[dropout]
        try:
            verdict = truth.judge(run).to_dict()
            verdict["error"] = gpu_accuracy.relative_error(run(tensors), truth.exact["y"])
        except FAILURES as error:
            verdict = {"passed": False, "where": f"{type(error).__name__}: {error}"[:300]}
        rows[name] = verdict
    return rows


def _time(work: Workload, tensors: Tensors, rows: dict[str, dict[str, Any]], timer: "Timer"):
    """Add the times of every provider to its row, all taken in turns."""
    sides = _SIDES[work.operation.name]
    dy = torch.randn_like(providers(work, tensors, 0.0)["plain"](tensors))
    calls = {}
    for name, run in providers(work, tensors, work.dropout).items():
        if name in rows:
            wanted = ("x",) if name == "bare" else sides
            calls[name] = _call(run, tensors, wanted, dy if work.backward else None)
    for name, milliseconds in timer.interleaved(calls).items():
        rows[name] |= {"ms": Spread.of(milliseconds).to_dict(5)}
    if timer.on_gpu:
        graphs = {name: graph for name, call in calls.items() if (graph := captured(call))}
        for name, row in rows.items():
            row["eager_ms"] = row["ms"]
            row["graph"] = name in graphs
        for name, milliseconds in timer.interleaved(graphs).items():
            rows[name] |= {"ms": Spread.of(milliseconds).to_dict(5)}


def _call(run: Run, tensors: Tensors, wanted: tuple[str, ...], dy) -> Callable[[], object]:
    leaves = {
        n: t.detach().requires_grad_(dy is not None and n in wanted) for n, t in tensors.items()
    }

    def call() -> object:
        y = run(leaves)
        return y if dy is None else torch.autograd.grad(y, [leaves[n] for n in wanted], dy)

    return call


def captured(call: Callable[[], object]) -> Callable[[], object] | None:
    """The call as a CUDA graph, or None where it cannot be captured."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


class Timer:
    """Milliseconds on a device: by events on a GPU with its L2 flushed, by the clock on a CPU."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.on_gpu, self.rounds = device.type == "cuda", rounds
        self.warmup = 2 if self.on_gpu else 0
        size = _FLUSHED_BYTES if self.on_gpu else 1
        self.flushed = torch.empty(size, dtype=torch.uint8, device=device)

    def milliseconds(self, call: Callable[[], object]) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def best(self, call: Callable[[], object]) -> float:
        """Seconds of the fastest of several calls."""
        return min(self.interleaved({"": call})[""]) / 1e3

    def interleaved(self, calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Milliseconds of each call in each round, in an order of its own per round."""
        order, times = list(calls), {name: [] for name in calls}
        shuffle = random.Random(0).shuffle
        for number in range(self.warmup + self.rounds):
            shuffle(order)
            for name in order:
                milliseconds = self.milliseconds(calls[name])
                if number >= self.warmup:
                    times[name].append(milliseconds)
        return times
