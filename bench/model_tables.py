"""Training in short, a model a row, from the rows of `artemis bench train`.

Two tables: `models` shows what the hybrid gains, `baselines` its speed against other ways to
train. Each way is shown at its fastest: on a fused model or as transformers made it, full
fine-tuning by transformers' loss or by ours. Neither is what an adapter is about, and where two
arms differ by less than a run does, the faster one makes no promise too large.
An extrapolated time multiplies what a layer's errs by. So each speedup of an extrapolated model has
its range: where the two times err in opposite directions, each by its own p20–p80.
"""

import math
from collections.abc import Callable, Iterable, Sequence

from artemis.benchmark.arms import ARMS, BASELINE
from artemis.benchmark.records import Record
from artemis.benchmark.tables import Column, filled, notes, piped

TOKENS = 1024
_FULL = (BASELINE, "full-autocast-lean")
_SHOWN = ("peft", "hybrid", "hybrid-int8")
_BEST, _WITH_HEAD = "hybrid-int8", "hybrid-int8-head"
_FUSED = "-fused"
_RANGES = "In brackets: the speedup if both times err in opposite directions, each by its p20–p80."


def models(rows: Sequence[Record]) -> str:
    """Samples a second of full fine-tuning and of adapters, and what the int8 base gains."""
    return _table(_MODELS, rows)


def baselines(rows: Sequence[Record]) -> str:
    """The speed of the hybrid over int8 against other ways to train, and what a step costs."""
    return _table(_BASELINES, rows)


def _table(columns: Sequence[Column], rows: Sequence[Record]) -> str:
    """At `TOKENS` tokens a step, without empty columns; below it, how models were extrapolated."""
    whole = [by for by in by_model(rows) if BASELINE in by and has(by, _BEST)]
    lines = [{**best(by), "by": by} for by in whole]
    made = piped(filled(columns, lines), lines)
    parts = [line for line in lines if is_extrapolated(line)]
    if not parts:
        return made
    measured = "\n".join(f"- {note}" for note in notes(parts))
    return f"{made}\n\n{measured}\n\n{_RANGES}"


def by_model(rows: Iterable[Record]) -> list[dict[str, Record]]:
    """The timed arms of every model and mode, at `TOKENS` tokens a step."""
    return by_setting(row for row in rows if row["tokens"] == TOKENS and "ms" in row)


def by_setting(rows: Iterable[Record]) -> list[dict[str, Record]]:
    """The arms of every model, mode and sequence."""
    found: dict[tuple, dict[str, Record]] = {}
    for row in rows:
        found.setdefault((name_of(row), row["sequence"]), {})[row["arm"]] = row
    return list(found.values())


def name_of(row: Record) -> str:
    """A model, and its mode."""
    return row["model"] + (", compiled" if row.get("compiled") else "")


def is_extrapolated(row: Record) -> bool:
    """Whether a row is of some layers, from which the whole was reckoned."""
    return row.get("how", "").startswith("extrapolated")


def fastest(by: dict[str, Record], *arms: str) -> Record | None:
    """Of a model's rows, the fastest of some arms, on a fused model or not; None: there is none."""
    rows = [by[name] for arm in arms for name in variants(arm) if name in by]
    return min(rows, key=lambda row: row["ms"]["p50"], default=None)


def has(by: dict[str, Record], arm: str) -> bool:
    """Whether an arm is there, on a fused model or not."""
    return any(name in by for name in variants(arm))


def variants(arm: str) -> tuple[str, str]:
    """An arm as transformers made its model, and on a fused one."""
    return arm, arm + _FUSED


def full(by: dict[str, Record]) -> Record:
    """Full fine-tuning under bf16 autocast at its fastest."""
    return fastest(by, *_FULL)


def best(by: dict[str, Record]) -> Record:
    """The hybrid over int8 at its fastest."""
    return fastest(by, _BEST)


def speedup(by: dict[str, Record], arm: str) -> float:
    """How many times as fast as `full` an arm of the same model is, both at their fastest."""
    return fastest(by, arm)["speedup"][full(by)["arm"]]


def saved(by: dict[str, Record], baseline: str = BASELINE) -> float | None:
    """The share of a baseline's peak that the hybrid over int8 does not need."""
    other, own = fastest(by, baseline), best(by)
    measured = other and "memory" in other and "memory" in own
    return 1 - own["memory"]["peak"] / other["memory"]["peak"] if measured else None


def _samples(arm: str) -> Callable[[Record], str]:
    def cell(row: Record) -> str:
        measured = fastest(row["by"], arm)
        return f"{measured['samples_per_second']:,.3g}" if measured else ""

    return cell


def _times(baseline: str | None = None, arm: str = _BEST) -> Callable[[Record], str]:
    """A speedup, with its range if it is extrapolated."""

    def cell(row: Record) -> str:
        by = row["by"]
        other, own = fastest(by, baseline) if baseline else full(by), fastest(by, arm)
        return "" if other is None or own is None else _ratio(row, other, own)

    return cell


def _as_run(row: Record) -> str:
    """Against full fine-tuning under bf16 autocast as transformers has it."""
    return _ratio(row, row["by"][BASELINE], best(row["by"]))


def _with_head(row: Record) -> str:
    """That of the head in int8 too, unless only the other was measured on a fused model."""
    by = row["by"]
    if (_BEST + _FUSED in by) != (_WITH_HEAD + _FUSED in by):
        return ""
    return _times(arm=_WITH_HEAD)(row)


def _ratio(row: Record, other: Record, own: Record) -> str:
    times = own["speedup"].get(other["arm"], other["ms"]["p50"] / own["ms"]["p50"])
    if not is_extrapolated(row):
        return f"{times:.2f}"
    low, high = speedup_range(other["ms"], own["ms"])
    return f"{times:.2f} ({low:.1f}–{'∞' if high == math.inf else f'{high:.1f}'})"


def speedup_range(baseline: Record, arm: Record) -> tuple[float, float]:
    """Of their times; one that may be nothing, since a difference of two, bounds no ratio."""
    high = baseline["p80"] / arm["p20"] if arm["p20"] > 0 else math.inf
    return max(baseline["p20"], 0.0) / arm["p80"], high


def _saved(baseline: str) -> Callable[[Record], str]:
    def cell(row: Record) -> str:
        share = saved(row["by"], baseline)
        return "" if share is None else f"{share:.0%}"

    return cell


_MODEL = Column("model", name_of, words=True)
_MODELS = (
    _MODEL,
    Column("full fine-tuning", lambda row: f"{full(row['by'])['samples_per_second']:,.3g}"),
    *(Column(ARMS[arm].what, _samples(arm)) for arm in _SHOWN),
    Column("int8 base: speedup", _times()),
    Column("less memory", _saved(BASELINE)),
)
_BASELINES = (
    _MODEL,
    Column("× full as transformers has it", _as_run),
    Column("× full fp32", _times("full-fp32")),
    Column("× full, all bf16", _times("full-bf16")),
    Column("× full, torchao's int8", _times("full-int8")),
    Column("× PEFT LoRA", _times("peft")),
    Column("with its head in int8", _with_head),
    Column("less memory than all bf16", _saved("full-bf16")),
    Column("FLOPs", lambda row: f"{row['flops_relative']:.0%}"),
    Column("device-seconds", lambda row: f"{1 / speedup(row['by'], _BEST):.0%}"),
)
