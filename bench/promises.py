"""What the method's document promises against what was measured here, a promise a row."""

from artemis.benchmark.quality.results import datasets
from artemis.benchmark.records import Record
from artemis.benchmark.tables import Column, piped

from .command_tables import rows_here
from .model_tables import (
    best,
    by_model,
    by_setting,
    has,
    is_extrapolated,
    name_of,
    saved,
    speedup,
    variants,
)  # fmt: skip

Figures = list[tuple[str, float]]  # where, how much

SPEED, MEMORY, COMPUTE = 2.7, 0.65, 0.30
_ARM, _PLAIN = "hybrid-int8", "full-bf16"
_MARK = "†"
_NOTE = f"{_MARK} extrapolated; the table of training steps has the range of each such speedup."
_COLUMNS = tuple(
    Column(title, lambda row, title=title: row[title], words=True)
    for title in ("promised", "measured", "verdict")
)


def table(records: list[Record]) -> str:
    """The promises in their document's order, on the machine that trained last.

    What has no measurement is left out.
    """
    trained = [by for by in by_model(rows_here("train", records)) if has(by, _ARM)]
    decoded = by_setting(rows_here("decode", records))
    decoded = [by for by in decoded if has(by, _ARM) and has(by, _PLAIN)]
    lines = []
    if decoded:
        lines.append(_inference(decoded))
    if trained:
        lines += [_throughput(trained), _memory(trained), _compute(trained)]
    if found := _quality(records):
        lines.append(found)
    made = piped(_COLUMNS, lines) + "\n" if lines else ""
    return f"{made}\n{_NOTE}\n" if _MARK in made else made


def _inference(models: list[dict[str, Record]]) -> Record:
    """Both at their fastest, on a fused model or not: it is not the same one in each part."""

    def of(part: str, label: str = "") -> Figures:
        found = []
        for by in models:
            plain, own = (_milliseconds(by, arm, part) for arm in (_PLAIN, _ARM))
            row = next(by[name] for name in variants(_ARM) if name in by)
            where = f"{_label(row)}, {row['sequence']:,} tokens{label}"
            found.append((where, round(plain / own, 3)))
        return found

    return {
        "promised": f"{SPEED}× inference",
        "measured": f"decoding {_range(of('decode'), '{:.2f}×')}, prompts"
        f" {_range(of('prefill'), '{:.2f}×')} the speed of the plain bf16 model",
        "verdict": _verdict(
            of("decode", " in decoding") + of("prefill", " in prompts"), at_least=SPEED
        ),
    }


def _milliseconds(by: dict[str, Record], arm: str, part: str) -> float:
    return min(by[name][part]["ms"]["p50"] for name in variants(arm) if name in by)


def _throughput(models: list[dict[str, Record]]) -> Record:
    found = [(_label(best(by)), speedup(by, _ARM)) for by in models]
    return {
        "promised": f"{SPEED}× the training throughput",
        "measured": f"{_range(found, '{:.2f}×')} full fine-tuning",
        "verdict": _verdict(found, at_least=SPEED),
    }


def _memory(models: list[dict[str, Record]]) -> Record:
    shares = [(_label(best(by)), saved(by)) for by in models]
    found = [(where, share) for where, share in shares if share is not None]
    return {
        "promised": f"{MEMORY:.0%} less memory",
        "measured": f"{_range(found, '{:.0%}')} less, training",
        "verdict": _verdict(found, at_least=MEMORY),
    }


def _compute(models: list[dict[str, Record]]) -> Record:
    def of(key: str) -> Figures:
        return [(_label(best(by)), best(by)[key]) for by in models]

    times = [(_label(best(by)), 1 / speedup(by, _ARM)) for by in models]
    return {
        "promised": f"{COMPUTE:.0%} of the training compute",
        "measured": f"a step: {_range(of('flops_relative'), '{:.0%}')} of the FLOPs,"
        f" {_range(times, '{:.0%}')} of the device-seconds",
        "verdict": _verdict(of("flops_relative"), at_most=COMPUTE),
    }


def _label(row: Record) -> str:
    """The model, marked where no whole one was measured."""
    return name_of(row) + _MARK * is_extrapolated(row)


def _quality(records: list[Record]) -> Record | None:
    settings: dict[str, list[Record]] = {}
    for record in records:
        if record.get("kind") == "quality":
            settings.setdefault(str(record["setting"]), []).append(record)
    targets = [
        target
        for cells in settings.values()
        for found in datasets(cells)
        for target in found.targets()
        if target["what"] == "retention" and target["measured"]["low"] is not None
    ]
    if not targets:
        return None
    return {
        "promised": f"{targets[0]['target']:.1%} of the quality",
        "measured": "; ".join(map(_retention, targets)),
        "verdict": "; ".join(f"{each['dataset']}: {each['verdict']}" for each in targets),
    }


def _retention(target: Record) -> str:
    found = target["measured"]
    return (
        f"{target['dataset']} {found['value']:.1%}"
        f" ({100 * found['low']:.1f} to {100 * found['high']:.1f})"
    )


def _range(found: Figures, form: str) -> str:
    """From the least to the largest, each with where it was."""
    (low_at, low), *_, (high_at, high) = sorted([*found, found[0]], key=lambda each: each[1])
    if low == high:
        return form.format(low)
    return f"{form.format(low)} ({low_at}) to {form.format(high)} ({high_at})"


def _verdict(found: Figures, at_least: float | None = None, at_most: float | None = None) -> str:
    """Where the promise is kept, the best first."""
    best_first = sorted(found, key=lambda each: each[1], reverse=at_least is not None)
    kept = [
        where
        for where, value in best_first
        if (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    ]
    if len(kept) == len(found):
        return "met"
    return f"met by {', '.join(kept)}" if kept else "missed"
