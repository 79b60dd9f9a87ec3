"""Whole models as wide as Llama 3.2 1B and Llama 2 7B: training steps and decoding, arm by arm.

The arms are those of `artemis.benchmark.arms`, over a base in 16 and in 8 bits, and the frozen
floor. Weights and tokens are random; memory is each arm's own.
"""

import gc
from collections.abc import Iterator
from typing import Any

import torch

from artemis.benchmark.arms import ARMS, TrainingStep
from artemis.benchmark.models import Cell, build, random_tokens
from artemis.benchmark.runner import Spread
from artemis.benchmark.steps import NEW_TOKENS, Prepared, Step, prepare
from artemis.benchmark.timer import Timer

from ..floors import stop_gradients_before_attention
from .accuracy import FAILURES

TRAINING = ("full-autocast", "full-bf16", "floor", "peft", "hybrid", "hybrid-int8")
DECODING = ("full-bf16", "peft", "hybrid", "hybrid-int8", "hybrid-int4")


def models(device: torch.device, tiny: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for every model and arm, a training step and decoding in turns.

    Training: 8,192 and 1,024 tokens of Llama 2 7B's width, two layers of it, then Llama 3.2 1B.
    Decoding: one token after a prompt, adapters unmerged.
    """
    for (workload, arms), cell in _cells(tiny):
        for arm in arms:
            if arm not in ARMS or ARMS[arm].installed:
                yield _measured(workload, arm, cell, device, rounds)
                gc.collect()
                torch.cuda.empty_cache()


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
    workload: str, arm: str, cell: Cell, device: torch.device, rounds: int
) -> dict[str, Any]:
    tokens = cell.batch if workload == "decode" else cell.tokens
    row = {
        "kind": workload, "arm": arm, "model": cell.model, "layers": cell.layers, "tokens": tokens,
        "provider": f"artemis, {arm}" if arm.startswith("hybrid") else arm,
    }  # fmt: skip
    try:
        return row | _times(_prepared(workload, arm, cell), arm, tokens, device, rounds)
    except FAILURES as failure:
        return row | {"passed": False, "where": f"{type(failure).__name__}: {failure}"[:300]}


def _times(
    prepared: Prepared, arm: str, tokens: int, device: torch.device, rounds: int
) -> dict[str, Any]:
    timer = Timer(device, rounds, flush=False)  # a model's weights are past the cache
    if timer.on_gpu:  # what building and packing the model took is no part of a step
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = timer.interleaved({arm: prepared.run})[arm]
    spread = Spread.of([ms / prepared.count for ms in times])
    return {
        "ms": spread.to_dict(), "tokens_per_second": tokens / spread.p50 * 1e3,
        "trained_parameters": prepared.step.trained_parameters,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if timer.on_gpu else None,
    }  # fmt: skip


def _prepared(workload: str, arm: str, cell: Cell) -> Prepared:
    if arm != "floor":
        return prepare(Step(workload, arm, cell))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = build(cell.architecture, torch.bfloat16, cell.sequence + NEW_TOKENS)
        batch = random_tokens(cell.vocabulary, cell.batch, cell.sequence).to(device)
    step = TrainingStep(stop_gradients_before_attention(model), batch)
    return Prepared(step, 1, step)
