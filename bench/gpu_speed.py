"""Operations beside their peers on real layer shapes: the times of `bench.gpu`.

Peers are plain torch, `addmm` by hand, PEFT's layer where it is installed, and the bare product of
the frozen layer, below which none can go. Nothing is timed that fails the accuracy rule (a peer
draws dropout masks of its own, and is checked without).
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

import artemis_kernels
from artemis.benchmark.costs import cost_of_pass
from artemis.benchmark.operations import (
    OPERATIONS,
    SEED,
    Operation,
    Sizes,
    Tensors,
    Truth,
    operands,
    relative_error,
)  # fmt: skip
from artemis.benchmark.peaks import copy, gemm
from artemis.benchmark.peers import Run, peers
from artemis.benchmark.runner import Spread
from artemis.benchmark.timer import Timer
from artemis_kernels import Choice

from .gpu_accuracy import FAILURES, STRATEGIES, forced

_BOTTLENECK = ("x", "down", "up")
_SIDES = {  # no bias is timed, and the scale is a constant 1
    "lora_linear": ("x", "lora_a", "lora_b"),
    "adapter_linear": _BOTTLENECK,
    "bottleneck_adapter": _BOTTLENECK,
}


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
        **peers(operation, work.sizes, tensors, dropout),
    }
    for strategy in STRATEGIES[operation.name]:
        if strategy != strategy_taken and not (strategy == "one_pass" and work.dropout):
            found[f"artemis/{strategy}"] = lambda t, s=strategy: forced(operation, s, t, dropout)
    return found


def kernels(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """Peaks, then a row for every workload and provider."""
    dtype = torch.float32 if tiny else torch.bfloat16
    timer = Timer(device, rounds=1 if tiny else 20)
    rate = gemm(dtype, device, timer.best) * 1e9
    bandwidth = copy(device, timer.best) * 1e9
    yield {"kind": "peaks", "tflops": rate / 1e12, "gbs": bandwidth / 1e9}
    for work in workloads(tiny):
        torch.manual_seed(0)
        shown = {
            "op": work.operation.name, "dtype": str(dtype).removeprefix("torch."),
            "sizes": work.sizes._asdict(), "dropout": work.dropout, "backward": work.backward,
        }  # fmt: skip
        every = operands(work.operation, work.sizes, dtype, device)
        names = ("weight", *_SIDES[work.operation.name])
        tensors = {name: every[name] for name in names if name in every}
        choice = chosen(work, tensors)
        rows = _checked(work, tensors)
        _time(work, tensors, {name: row for name, row in rows.items() if row["passed"]}, timer)
        best = [rows[n]["ms"]["p50"] for n in ("plain", "addmm", "peft") if "ms" in rows.get(n, {})]
        for name, row in rows.items():
            if "ms" in row:
                seconds = row["ms"]["p50"] / 1e3
                which = "both" if work.backward else "forward"
                needed = cost_of_pass(
                    work.operation, work.sizes, name, choice.cost, dtype.itemsize, which
                )
                floor = max(needed.flops / rate, needed.bytes / bandwidth)
                row |= {
                    "tflops": needed.flops / seconds / 1e12, "gbs": needed.bytes / seconds / 1e9,
                    "over_floor": seconds / floor,
                    "over_best_peer": row["ms"]["p50"] / min(best) if best else None,
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
            verdict["error"] = relative_error(run(tensors), truth.exact["y"])
        except FAILURES as error:
            verdict = {"passed": False, "where": f"{type(error).__name__}: {error}"[:300]}
        rows[name] = verdict
    return rows


def _time(work: Workload, tensors: Tensors, rows: dict[str, dict[str, Any]], timer: Timer):
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
