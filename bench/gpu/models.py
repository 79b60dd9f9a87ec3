"""Whole models as wide as Llama 3.2 1B and Llama 2 7B: training steps and decoding, arm by arm.

The arms are those of `artemis.benchmark.arms`, over a base in 16 and in 8 bits, and the frozen
floor. Weights and tokens are random. Adapters pass the gate of `artemis bench` before they are
timed; a ratio is formed within a round; memory is each arm's own. What Python costs is told apart:
a step's row says how long the GPU was busy, a token is timed as a CUDA graph.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from artemis.benchmark.arms import ARMS, TrainingStep
from artemis.benchmark.decoding import Token
from artemis.benchmark.models import Cell, build, random_tokens
from artemis.benchmark.steps import Prepared, Step, check, prepare
from artemis.benchmark.timer import Timer, captured
from artemis.benchmark.turns import Spread
from artemis.training.masks import without_idle_masks

from ..floors import stop_gradients_before_attention
from . import decoding
from .busy import work_of
from .failures import FAILURES, failure, out_of_memory

TRAINING = (
    "full-autocast", "full-bf16", "full-bf16-fused", "floor", "peft", "hybrid", "hybrid-fused",
    "hybrid-fp8", "hybrid-fp8-fused", "hybrid-int8",
)  # fmt: skip
DECODING = ("full-bf16", "peft", "hybrid", "hybrid-int8", "hybrid-int4")
OURS = "hybrid"  # how the names of Artemis' arms begin
FULL = ("full-autocast", "full-bf16", "full-bf16-fused")  # what speeds are against
_CHECKED_TOKENS = 64  # of each sequence
_GRAPHS_UP_TO = 8192  # tokens: the graph of each arm keeps its activations, all at once
_SHOWN_KERNELS = 24
Row = dict[str, Any]


class _Entered(NamedTuple):
    """An arm that passed the gate: its step, its verdict, and the bytes that it holds."""

    step: TrainingStep
    verdict: Row
    held: int


def models(device: torch.device, tiny: bool, rounds: int) -> Iterator[Row]:
    """A row for every model, batch and arm.

    Training: 1,024 to 32,768 tokens of Llama 2 7B's width, two layers of it, then Llama 3.2 1B.
    Decoding: one token after each of one or 16 prompts, adapters unmerged.
    """
    for (workload, arms), cell, batches in cells(tiny):
        present = [arm for arm in arms if arm not in ARMS or ARMS[arm].installed]
        if rounds == 1 and not tiny:  # a rehearsal, for kernels: ours, and one layer has them all
            present = [arm for arm in present if arm.startswith(OURS)]
            cell = replace(cell, layers=1)
        yield from _measured(workload, present, cell, batches, device, rounds)


def cells(
    tiny: bool,
) -> Iterator[tuple[tuple[str, tuple[str, ...]], Cell, tuple[int, ...]]]:
    """What is done by which arms, on which model, and the batches that take turns with it."""
    train, decode = ("train", TRAINING), ("decode", DECODING)
    if tiny:
        yield train, Cell("64x1", 1, 96, 2, 16, True), (2, 1)
        yield decode, Cell("64x1", 1, 96, 1, 16, True), (1,)
        return
    yield train, Cell("llama-2-7b", 2, 4096, 8, 1024, True), (8, 1, 2, 32)
    yield decode, Cell("llama-2-7b", 2, 4096, 1, 128, True), (1, 16)
    yield train, Cell("llama-3.2-1b", 16, 32768, 4, 1024, True), (4,)
    yield decode, Cell("llama-3.2-1b", 16, 32768, 1, 128, True), (1,)


def _measured(
    workload: str, arms: Sequence[str], cell: Cell, batches: Sequence[int], device: torch.device,
    rounds: int,
) -> Iterator[Row]:  # fmt: skip
    """A row for every batch and arm, timed in turns; one arm alone where they do not all fit."""
    timer = Timer(device, rounds, flush=False)  # a model's weights are past the cache
    entered = _enter_all(workload, arms, cell, timer.on_gpu)
    if entered is None:
        _free()
        for arm in arms:
            yield from _measured(workload, [arm], cell, batches, device, rounds)
        return
    ready, failed = entered
    yield from failed
    for batch in batches:
        yield from _in_turns(workload, ready, replace(cell, batch=batch), timer)


def _enter_all(
    workload: str, arms: Sequence[str], cell: Cell, on_gpu: bool
) -> tuple[dict[str, _Entered], list[Row]] | None:
    """Arms that may be timed, and a row for each other; None where memory does not hold all."""
    ready, failed = {}, []
    for arm in arms:
        row, one = _about(workload, arm, cell), None
        try:
            one = _enter(workload, arm, cell, on_gpu)
        except FAILURES as error:
            if len(arms) > 1 and out_of_memory(error):
                return None
            row |= failure(error)
        if one is not None and one.verdict["passed"]:
            ready[arm] = one
            continue
        failed.append(row if one is None else row | one.verdict)
        del one
        _free()
    return ready, failed


def _enter(workload: str, arm: str, cell: Cell, on_gpu: bool) -> _Entered:
    """Prepare an arm and hold it to the gate."""
    before = torch.cuda.memory_allocated() if on_gpu else 0
    prepared = _prepared(workload, arm, cell)
    verdict = _checked(workload, arm, cell, prepared)
    if workload == "train" and verdict["passed"]:
        prepared.run()  # an optimizer has its states after the first step
    step = prepared.step
    del prepared
    _free()  # what building, packing and checking took is no part of a step
    return _Entered(step, verdict, torch.cuda.memory_allocated() - before if on_gpu else 0)


def _in_turns(workload: str, ready: dict[str, _Entered], cell: Cell, timer: Timer) -> Iterator[Row]:
    """Rows of one batch; an arm that fails leaves the others."""
    rows, calls = {}, {}
    for arm, entered in ready.items():
        rows[arm] = _about(workload, arm, cell) | entered.verdict
        try:
            calls[arm], rows[arm]["peak_gb"] = _warmed(workload, entered, cell, timer.on_gpu)
        except FAILURES as error:
            entered.step.model.zero_grad()
            rows[arm] |= failure(error)
    try:
        times, more = _timed(workload, calls, timer, cell.tokens <= _GRAPHS_UP_TO)
    except FAILURES as error:
        yield from (row | failure(error) for row in rows.values())
        return
    for arm in calls:
        spread = Spread.of(times[arm])
        rows[arm] |= more[arm] | {
            "ms": spread.to_dict(),
            "tokens_per_second": rows[arm]["tokens"] / spread.p50 * 1e3,
            "trained_parameters": ready[arm].step.trained_parameters,
            "speedup": _speedup(times, arm),
        }
    yield from rows.values()


def _warmed(workload: str, entered: _Entered, cell: Cell, on_gpu: bool) -> tuple[Any, float | None]:
    """The call that is timed, made twice, and the memory in GB that it takes at most."""
    step = entered.step
    step.batch = random_tokens(cell.vocabulary, cell.batch, cell.sequence).to(step.batch.device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - entered.held
    call = Token(step) if workload == "decode" else step
    for _ in range(2):
        call()
    return call, (torch.cuda.max_memory_allocated() - others) / 1e9 if on_gpu else None


def _timed(
    workload: str, calls: dict[str, Any], timer: Timer, graphs: bool
) -> tuple[dict[str, list[float]], dict[str, Row]]:
    """Milliseconds of every arm in each round, and what else its row says of time."""
    if workload == "decode":
        return decoding.in_turns(calls, timer)
    times = timer.interleaved(calls)
    rows: dict[str, Row] = {arm: {} for arm in calls}
    if timer.on_gpu:
        found = [_worked(calls, times), _replayed(calls, timer) if graphs else {}]
        rows = {arm: {k: v for of in found for k, v in of.get(arm, {}).items()} for arm in calls}
    return times, rows


def _worked(calls: dict[str, Any], times: dict[str, list[float]]) -> dict[str, Row]:
    """How long the GPU was busy in a step, its share of the time, and speeds by it alone."""
    seen = {arm: work for arm, call in calls.items() if (work := work_of(call)) is not None}
    return {
        arm: {
            "busy_ms": work.busy_ms, "busy_share": work.busy_ms / Spread.of(times[arm]).p50,
            "busy_speedup": {
                full: seen[full].busy_ms / work.busy_ms for full in FULL if full in seen
            },
            "kernels": work.kernels[:_SHOWN_KERNELS],
        }
        for arm, work in seen.items()
    }  # fmt: skip


def _replayed(calls: dict[str, Any], timer: Timer) -> dict[str, Row]:
    """Steps replayed as CUDA graphs, which Python costs nothing, and speeds of those."""
    with without_idle_masks({}):  # else attention gets a mask that it has not in a step as it is
        found = {arm: graph for arm, call in calls.items() if (graph := captured(call))}
    times = timer.interleaved(found, idle=False)
    return {
        arm: {
            "graph_ms": Spread.of(times[arm]).to_dict(5),
            "graph_speedup": _speedup(times, arm),
        }
        for arm in found
    }


def _speedup(times: dict[str, list[float]], arm: str) -> dict[str, dict[str, float]]:
    """Against every full fine-tuning that took turns with it, within each round."""
    ratios = {
        full: [ms / own for ms, own in zip(times[full], times[arm], strict=True)]
        for full in FULL
        if full in times
    }
    return {full: Spread.of(each).to_dict() for full, each in ratios.items()}


def _about(workload: str, arm: str, cell: Cell) -> Row:
    return {
        "kind": workload, "arm": arm, "model": cell.model, "layers": cell.layers,
        "tokens": cell.batch if workload == "decode" else cell.tokens,
        "provider": f"artemis, {arm}" if arm.startswith(OURS) else arm,
    }  # fmt: skip


def _prepared(workload: str, arm: str, cell: Cell) -> Prepared:
    if arm != "floor":
        return prepare(Step(workload, arm, cell))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = build(cell.architecture, torch.bfloat16, cell.sequence)
        batch = random_tokens(cell.vocabulary, cell.batch, cell.sequence).to(device)
    step = TrainingStep(stop_gradients_before_attention(model), batch)
    return Prepared(step, 1, step)


def _checked(workload: str, arm: str, cell: Cell, prepared: Prepared) -> Row:
    """The gate's verdict, on a few tokens of every sequence; what adapts nothing passes."""
    if arm not in ARMS or ARMS[arm].is_full:
        return {"passed": True}
    step, whole = prepared.step, prepared.step.batch
    step.batch = whole[:, :_CHECKED_TOKENS]
    try:
        verdict = check(Step(workload, arm, cell), prepared)
    finally:
        step.batch = whole
    return {"passed": verdict.passed, "error": verdict.ratio, "where": verdict.role}


def _free() -> None:
    """Give back what no arm holds."""
    gc.collect()
    torch.cuda.empty_cache()
