"""Operations beside their peers on real layer shapes; `artemis/S` is another strategy S, forced."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

import artemis_kernels
from artemis.benchmark.measure import measure
from artemis.benchmark.operations import OPERATIONS, Operation, Sizes, Tensors
from artemis.benchmark.peaks import copy, gemm
from artemis.benchmark.peers import Run
from artemis.benchmark.timer import Timer

from .accuracy import STRATEGIES, forced
from .failures import FAILURES, Row, contained

_COMPILED = (0, 6)  # workloads that `torch.compile` is timed on: one of LoRA, one of a bottleneck
_ONE_READ = 2048  # up to this width a row block finds x in the cache again


class Workload(NamedTuple):
    """An operation on one layer; `which` is the pass."""

    operation: Operation
    sizes: Sizes
    dropout: float
    which: str

    @property
    def name(self) -> str:
        m, k, n, r = self.sizes
        return f"{m} × {k} × {n}, {r}"


def workloads(tiny: bool) -> Iterator[Workload]:
    """Layers of Llama 2 7B and Llama 3.2 1B at 8,192, one and 16 rows, most telling first; then
    what else is predicted.

    A bottleneck alone is wide as a block's output: once beside the copy's bandwidth, once trained.
    """
    lora, adapter, bottleneck = OPERATIONS
    if tiny:
        sizes, block = Sizes(16, 32, 48, 8), Sizes(16, 32, 32, 8)
        yield Workload(lora, sizes, 0.1, "both")
        yield Workload(adapter, sizes, 0.0, "forward")
        yield Workload(bottleneck, block, 0.0, "forward")
        return
    rows = 8192
    layers = ((4096, 4096), (4096, 1024), (2048, 2048))
    yield from (Workload(lora, Sizes(rows, k, n, 16), 0.1, "both") for k, n in layers)
    for hidden in (4096, 2048):
        yield Workload(bottleneck, Sizes(rows, hidden, hidden, 64), 0.0, "forward")
    yield Workload(lora, Sizes(1, 4096, 4096, 16), 0.0, "forward")
    for k, n in ((4096, 11008), (11008, 4096)):
        yield Workload(adapter, Sizes(rows, k, n, 64), 0.1, "both")
    yield from (Workload(lora, Sizes(rows, k, n, 16), 0.0, "both") for k, n in layers)
    for hidden in (4096, 2048):
        yield Workload(bottleneck, Sizes(rows, hidden, hidden, 64), 0.1, "both")
    yield Workload(adapter, Sizes(1, 4096, 11008, 64), 0.0, "forward")
    yield Workload(lora, Sizes(16, 4096, 4096, 16), 0.0, "forward")
    yield Workload(adapter, Sizes(16, 4096, 11008, 64), 0.0, "forward")
    yield from _predicted(lora)


def _predicted(lora: Operation) -> Iterator[Workload]:
    """What else `bench.cost_model` predicts of single layers, without any that is above."""
    for rows, layers in (
        (8192, ((4096, 11008), (8192, 8192))),
        (1024, ((4096, 4096), (4096, 1024), (4096, 11008), (8192, 8192))),
    ):
        for k, n in layers:
            for dropout in (0.1, 0.0):
                yield Workload(lora, Sizes(rows, k, n, 16), dropout, "both")


def operations(device: torch.device, tiny: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """Peaks, then a row for every workload and provider."""
    dtype = torch.float32 if tiny else torch.bfloat16
    timer = Timer(device, rounds)
    peaks = {"gflops": gemm(dtype, device, timer.best), "gbs": copy(device, timer.best)}
    yield {"kind": "peaks", **peaks}
    for number, work in enumerate(workloads(tiny)):
        about = {
            "kind": "kernel", "op": work.operation.name, **work.sizes._asdict(),
            "dropout": work.dropout, "pass": work.which,
        }  # fmt: skip
        rows = _measured(work, dtype, device, timer, peaks, number in _COMPILED)
        yield from contained((about | row for row in rows), about)


def _measured(
    work: Workload, dtype: torch.dtype, device: torch.device, timer: Timer, peaks: Row,
    compiles: bool,
) -> Iterator[Row]:  # fmt: skip
    for row in measure(
        work, dtype, device, timer, peaks,
        more=strategies, impl="triton", failures=FAILURES, compiles=compiles,
    ):  # fmt: skip
        if work.operation.name == "bottleneck_adapter" and work.which == "forward":
            row |= _beside_a_copy(row, work.sizes, dtype.itemsize, peaks["gbs"])
        yield row | {"passed": row["gate"]["passed"], "where": row["gate"].get("where")}


def strategies(work: Workload, tensors: Tensors, dropout: float) -> dict[str, Run]:
    """Strategies other than the one that is taken."""
    given = tensors | {"x": tensors["x"].detach().requires_grad_(work.which != "forward")}
    taken = artemis_kernels.explain(
        work.operation.name, **{"scale": 1.0} | given, dropout_p=work.dropout, impl="triton"
    ).strategy
    return {
        f"artemis/{strategy}": lambda t, s=strategy: forced(work.operation, s, t, dropout)
        for strategy in STRATEGIES[work.operation.name]
        if strategy != taken and not (strategy == "one_pass" and work.dropout)
    }


def _beside_a_copy(row: dict[str, Any], sizes: Sizes, itemsize: int, gbs: float) -> dict[str, Any]:
    """Share of the copy's bandwidth of a bottleneck's bytes: x once, or twice if wide, and y."""
    if "ms" not in row:
        return {}
    moved = itemsize * sizes.m * sizes.k * (2 if sizes.k <= _ONE_READ else 3)
    return {"of_copy": moved / row["ms"]["p50"] / 1e6 / gbs}
