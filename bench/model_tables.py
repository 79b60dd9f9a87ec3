"""The short table of training, a model a row, from the rows of `artemis bench train`."""

from collections.abc import Callable, Sequence
from typing import Any

from artemis.benchmark.arms import ARMS, BASELINE
from artemis.benchmark.tables import Column, piped

Record = dict[str, Any]
_TOKENS = 1024
_HYBRIDS = ("hybrid", "hybrid-int8")
_BEST, _WITH_HEAD = "hybrid-int8", "hybrid-int8-head"


def table(rows: Sequence[Record]) -> str:
    """Samples a second of full fine-tuning and of the hybrids, at `_TOKENS` tokens a step."""
    models: dict[str, dict[str, Record]] = {}
    for row in rows:
        if row["tokens"] == _TOKENS and "ms" in row:
            models.setdefault(_model(row), {})[row["arm"]] = row
    whole = [by for by in models.values() if {BASELINE, _BEST} <= by.keys()]
    return piped(_COLUMNS, [{**by[_BEST], "by": by} for by in whole])


def _model(row: Record) -> str:
    return row["model"] + (", compiled" if row.get("compiled") else "")


def _samples(arm: str) -> Callable[[Record], str]:
    def cell(row: Record) -> str:
        measured = row["by"].get(arm)
        return f"{measured['samples_per_second']:,.3g}" if measured else ""

    return cell


def _times(baseline: str, arm: str = _BEST) -> Callable[[Record], str]:
    def cell(row: Record) -> str:
        times = row["by"].get(arm, {}).get("speedup", {}).get(baseline)
        return f"{times:.2f}" if times else ""

    return cell


def _saved(baseline: str) -> Callable[[Record], str]:
    """What the hybrid's peak is below the baseline's."""

    def cell(row: Record) -> str:
        other = row["by"].get(baseline)
        measured = other and "memory" in other and "memory" in row
        return f"{1 - _peak(row) / _peak(other):.0%}" if measured else ""

    return cell


def _peak(row: Record) -> float:
    return row["memory"]["peak"]


_COLUMNS = (
    Column("model", _model, words=True),
    Column("full, samples/s", _samples(BASELINE)),
    *(Column(f"{ARMS[arm].what}, samples/s", _samples(arm)) for arm in _HYBRIDS),
    Column("int8 base: speedup", _times(BASELINE)),
    Column("× fp32", _times("full-fp32")),
    Column("× all bf16", _times("full-bf16")),
    Column("× torchao's int8", _times("full-int8")),
    Column("with its head in int8", _times(BASELINE, _WITH_HEAD)),
    Column("less memory", _saved(BASELINE)),
    Column("than all bf16", _saved("full-bf16")),
    Column("FLOPs", lambda row: f"{row['flops_relative']:.0%}"),
    Column("device-seconds", lambda row: f"{row['device_seconds_relative']:.0%}"),
)
