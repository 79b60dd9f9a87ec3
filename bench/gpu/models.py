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

TRAINING = ("full-autocast", "full-bf16", "floor", "peft", "hybrid", "hybrid-int8")
DECODING = ("full-bf16", "peft", "hybrid", "hybrid-int8", "hybrid-int4")


def models(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """Training, then decoding; a row for every model and arm."""
    yield from _training(device, tiny)
    yield from _decoding(device, tiny)


def _training(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """A training step, 8,192 and 1,024 tokens of Llama 2 7B's width first, two layers of it."""
    if tiny:
        cells = (Cell("64x1", 1, 96, 2, 16, True),)
    else:
        cells = tuple(Cell("llama-2-7b", 2, 4096, batch, 1024, True) for batch in (8, 1))
        cells += (Cell("llama-3.2-1b", 16, 32768, 4, 1024, True),)
    for cell in cells:
        for arm in TRAINING:
            yield from _measured("train", arm, cell, device, tiny)


def _decoding(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """One token after a prompt, adapters unmerged; two layers of Llama 2 7B's width, then 1B's."""
    if tiny:
        cells = (Cell("64x1", 1, 96, 1, 16, True),)
    else:
        cells = tuple(Cell("llama-2-7b", 2, 4096, batch, 128, True) for batch in (1, 16))
        cells += (Cell("llama-3.2-1b", 16, 32768, 1, 128, True),)
    for cell in cells:
        for arm in DECODING:
            yield from _measured("decode", arm, cell, device, tiny)


def _measured(
    workload: str, arm: str, cell: Cell, device: torch.device, tiny: bool
) -> Iterator[dict[str, Any]]:
    if arm in ARMS and not ARMS[arm].installed:
        return
    timer = Timer(device, rounds=1 if tiny else 10)
    if timer.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    prepared = _prepared(workload, arm, cell)
    spread = Spread.of([ms / prepared.count for ms in timer.interleaved({arm: prepared.run})[arm]])
    tokens = cell.batch if workload == "decode" else cell.tokens
    yield {
        "kind": workload, "arm": arm, "model": cell.model, "layers": cell.layers,
        "tokens": tokens, "ms": spread.to_dict(), "tokens_per_second": tokens / spread.p50 * 1e3,
        "trained_parameters": prepared.step.trained_parameters,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if timer.on_gpu else None,
    }  # fmt: skip
    del prepared
    gc.collect()
    torch.cuda.empty_cache()


def _prepared(workload: str, arm: str, cell: Cell) -> Prepared:
    if arm != "floor":
        return prepare(Step(workload, arm, cell))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = build(cell.architecture, torch.bfloat16, cell.sequence + NEW_TOKENS)
        batch = random_tokens(cell.vocabulary, cell.batch, cell.sequence).to(device)
    step = TrainingStep(stop_gradients_before_attention(model), batch)
    return Prepared(step, 1, step)
