"""Decoding token by token on a GPU: as a CUDA graph, without what Python costs a token.

The cache is transformers' static one, whose position is a tensor: the same step can be replayed.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import StaticCache

from artemis.benchmark.arms import TrainingStep
from artemis.benchmark.steps import NEW_TOKENS
from artemis.benchmark.timer import Timer, captured
from artemis.benchmark.turns import Spread

_EAGER_ROUNDS = 3  # of many calls each
Times = dict[str, list[float]]  # milliseconds of each round


class Token:
    """A call decodes one token after the batch's prompts; `rewind` forgets those decoded."""

    def __init__(self, step: TrainingStep) -> None:
        self._model, prompts = step.model, step.batch
        self._cache = StaticCache(self._model.config, max_cache_len=prompts.shape[1] + NEW_TOKENS)
        self._token = prompts[:, -1:].clone()
        self._tokens_read = prompts.shape[1]
        with torch.inference_mode():
            self._forward(prompts)

    def __call__(self) -> torch.Tensor:
        """The logits [batch, 1, vocabulary]; NEW_TOKENS calls may follow a `rewind`."""
        with torch.inference_mode():
            return self._forward(self._token)

    def rewind(self) -> None:
        with torch.inference_mode():
            for layer in self._cache.layers:
                layer.cumulative_length.fill_(self._tokens_read)

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._model(
            input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        ).logits


def in_turns(tokens: dict[str, Token], timer: Timer) -> tuple[Times, dict[str, dict[str, Any]]]:
    """Times of a token by each arm, all of one kind; and what the rows say of both kinds.

    As in `Timer.rows`: graphs' if every arm has one (`graph`), else those of the calls as they are.
    """
    brief = copy.copy(timer)
    brief.rounds = min(timer.rounds, _EAGER_ROUNDS)
    eager = _each(tokens, dict(tokens), brief, idle=True)
    rows = {arm: {"eager_ms": Spread.of(times).to_dict(5)} for arm, times in eager.items()}
    if not timer.on_gpu:
        return eager, {arm: {} for arm in tokens}
    graphs = {}
    for arm, token in tokens.items():
        token.rewind()
        if graph := captured(token):
            graphs[arm] = graph
    replayed = _each(tokens, graphs, timer, idle=False)
    for arm, times in replayed.items():
        rows[arm]["graph_ms"] = Spread.of(times).to_dict(5)
    everybody = graphs.keys() == tokens.keys()
    for row in rows.values():
        row["graph"] = everybody
    return replayed if everybody else eager, rows


def _each(
    tokens: dict[str, Token], steps: dict[str, Callable[[], object]], timer: Timer, idle: bool
) -> Times:
    """Milliseconds of one step, by runs of NEW_TOKENS that start at the prompt's end."""

    def run(arm: str) -> None:
        tokens[arm].rewind()
        for _ in range(NEW_TOKENS):
            steps[arm]()

    calls = {arm: lambda arm=arm: run(arm) for arm in steps}
    times = timer.interleaved(calls, idle=idle)
    return {arm: [ms / NEW_TOKENS for ms in each] for arm, each in times.items()}
