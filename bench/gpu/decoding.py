"""Decoding token by token on a GPU: as a CUDA graph, without what Python costs a token."""

import copy
from collections.abc import Callable
from typing import Any

from artemis.benchmark.decoding import NEW_TOKENS, Token
from artemis.benchmark.timer import Timer, captured
from artemis.benchmark.turns import Spread

_EAGER_ROUNDS = 3  # of many calls each
Times = dict[str, list[float]]  # milliseconds of each round


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
