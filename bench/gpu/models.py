"""Whole models as wide as Llama 3.2 1B and Llama 2 7B: training steps and decoding, arm by arm.

The arms are those of `artemis.benchmark.arms`, over a base in 16 and in 8 bits, and the frozen
floor. Weights and tokens are random. Adapters pass the gate of `artemis bench` before they are
timed; a ratio is formed within a round; memory is each arm's own.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from artemis.benchmark.arms import ARMS, TrainingStep
from artemis.benchmark.models import Cell, build, random_tokens
from artemis.benchmark.steps import NEW_TOKENS, Prepared, Step, check, prepare
from artemis.benchmark.timer import Timer
from artemis.benchmark.turns import Spread

from ..floors import stop_gradients_before_attention
from .failures import FAILURES, failure, out_of_memory

TRAINING = ("full-autocast", "full-bf16", "floor", "peft", "hybrid", "hybrid-int8")
DECODING = ("full-bf16", "peft", "hybrid", "hybrid-int8", "hybrid-int4")
OURS = "hybrid"  # how the names of Artemis' arms begin
FULL = ("full-autocast", "full-bf16")  # what speeds are against
_CHECKED_TOKENS = 64  # of each sequence
Row = dict[str, Any]


def models(device: torch.device, tiny: bool, rounds: int) -> Iterator[Row]:
    """A row for every model and arm.

    Training: 8,192 and 1,024 tokens of Llama 2 7B's width, two layers of it, then Llama 3.2 1B.
    Decoding: one token after a prompt, adapters unmerged.
    """
    for (workload, arms), cell in _cells(tiny):
        present = [arm for arm in arms if arm not in ARMS or ARMS[arm].installed]
        if rounds == 1 and not tiny:  # a rehearsal, for kernels: ours, and one layer has them all
            present = [arm for arm in present if arm.startswith(OURS)]
            cell = replace(cell, layers=1)
        yield from _measured(workload, present, cell, device, rounds)


def _cells(tiny: bool) -> Iterator[tuple[tuple[str, tuple[str, ...]], Cell]]:
    train, decode = ("train", TRAINING), ("decode", DECODING)
    if tiny:
        yield train, Cell("64x1", 1, 96, 2, 16, True)
        yield decode, Cell("64x1", 1, 96, 1, 16, True)
        return
    for tokens, prompts in ((8, 1), (1, 16)):
        yield train, Cell("llama-2-7b", 2, 4096, tokens, 1024, True)
        yield decode, Cell("llama-2-7b", 2, 4096, prompts, 128, True)
    yield train, Cell("llama-3.2-1b", 16, 32768, 4, 1024, True)
    yield decode, Cell("llama-3.2-1b", 16, 32768, 1, 128, True)


def _measured(
    workload: str, arms: Sequence[str], cell: Cell, device: torch.device, rounds: int
) -> list[Row]:
    """A row for every arm, timed in turns; one after another where that does not go."""
    try:
        return _in_turns(workload, arms, cell, device, rounds)
    except FAILURES as error:
        if len(arms) == 1:
            return [_about(workload, arms[0], cell) | failure(error)]
    finally:
        _free()
    alone = (_measured(workload, [arm], cell, device, rounds) for arm in arms)
    return [row for rows in alone for row in rows]


def _in_turns(
    workload: str, arms: Sequence[str], cell: Cell, device: torch.device, rounds: int
) -> list[Row]:
    """The same in one process's memory; an arm that fails leaves the others."""
    timer = Timer(device, rounds, flush=False)  # a model's weights are past the cache
    ready: dict[str, Prepared] = {}
    rows = {arm: _about(workload, arm, cell) for arm in arms}
    for arm, row in rows.items():
        try:
            row |= _enter(ready, workload, arm, cell, timer.on_gpu)
        except FAILURES as error:
            if len(arms) > 1 and out_of_memory(error):
                raise
            row |= failure(error)
    times = timer.interleaved({arm: prepared.run for arm, prepared in ready.items()})
    for arm, prepared in ready.items():
        spread = Spread.of([ms / prepared.count for ms in times[arm]])
        rows[arm] |= {
            "ms": spread.to_dict(),
            "tokens_per_second": rows[arm]["tokens"] / spread.p50 * 1e3,
            "trained_parameters": prepared.step.trained_parameters,
            "speedup": _speedup(times, arm),
        }
    return list(rows.values())


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


def _enter(ready: dict[str, Prepared], workload: str, arm: str, cell: Cell, on_gpu: bool) -> Row:
    """Prepare an arm, and if it passes the gate let it join `ready`; its verdict and memory."""
    _free()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    prepared = _prepared(workload, arm, cell)
    verdict = _checked(workload, arm, cell, prepared)
    if not verdict["passed"]:
        return verdict
    _free()  # what building, packing and checking took is no part of a step
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # an optimizer has its states after the first step
        prepared.run()
    ready[arm] = prepared
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9 if on_gpu else None
    return verdict | {"peak_gb": peak}


def _prepared(workload: str, arm: str, cell: Cell) -> Prepared:
    if arm != "floor":
        return prepare(Step(workload, arm, cell))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = build(cell.architecture, torch.bfloat16, cell.sequence + NEW_TOKENS)
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
