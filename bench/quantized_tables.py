"""The tables of docs/quantization.md, from what `python -m bench.quantized_quality` wrote."""

from statistics import mean

from artemis.benchmark.records import Record

from .logits_rounding import KIND as LOGITS
from .quantized_quality import FORMS, KIND, SIZES, TRAINED_ON

Losses = dict[tuple[int, str | None, str], float]  # (seed, trained on, read over)
#: (trained on, read over) -> the most that the loss may exceed that of bf16, as a share.
_TARGETS = {("bf16", "int8"): 0.005, ("bf16", "int4"): 0.03, ("int8", "int8"): 0.005}
_TARGETS |= {(trained, "int8 and head"): 0.005 for trained in ("bf16", "int8 and head")}
_MOST_BYTES = {"int8": 0.51, "fp8": 0.51, "int4": 0.29}


def losses(records: list[Record]) -> Losses:
    """The last record of each counts."""
    return {
        (r["seed"], r["trained_on"], r["form"]): r["loss"] for r in records if r["kind"] == KIND
    }


def excess(known: Losses, trained_on: str | None, form: str) -> list[float]:
    """Of each seed, the loss over that of the base in bf16 (trained and read), less one."""
    plain = None if trained_on is None else "bf16"
    return [
        loss / known[seed, plain, "bf16"] - 1
        for (seed, *which), loss in known.items()
        if which == [trained_on, form]
    ]


def regained(known: Losses, form: str) -> list[float]:
    """Of each seed, by how much training over `form` ends below an adapter moved there from bf16.

    As a share of the loss over bf16, like `excess`.
    """
    return [
        (known[seed, "bf16", form] - loss) / known[seed, "bf16", "bf16"]
        for (seed, *which), loss in known.items()
        if which == [form, form]
    ]


def quality(records: list[Record]) -> str:
    """Held-out losses, and how far each is from the base in bf16."""
    known = losses([record for record in records if "kind" in record])
    if not known:
        return ""
    lines = [
        "| adapter trained over | read over | loss | against bf16 | each seed | target | |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for trained_on in (None, *TRAINED_ON):
        for form in FORMS:
            if found := excess(known, trained_on, form):
                lines.append(_row(known, trained_on, form, found))
    head = next(r for r in records if r.get("run") == _last_run(records) and "recipe" in r)
    return "\n".join([*lines, "", _regained(known), "", _setting(head), ""])


def _regained(known: Losses) -> str:
    won = regained(known, "int4")
    cost = mean(excess(known, "bf16", "int4"))
    return (
        f"Moved from bf16 to int4, an adapter loses {cost:.2%}; trained over int4 it ends"
        f" {mean(won):.2%} lower than moved there ({min(won):+.2%} to {max(won):+.2%}, lower in"
        f" {sum(each > 0 for each in won)} of {len(won)} seeds)."
    )


def _setting(head: Record) -> str:
    recipe = head["recipe"]
    step = recipe["batch_size"] * recipe["sequence_length"]
    return (
        f"{head['processor']['name']}, {head['threads']} thread, torch"
        f" {head['versions']['torch']}, {head['time'][:10]}; hidden {recipe['hidden_size']},"
        f" {recipe['layers']} layers, {recipe['adapt_steps']} steps of {step:,} tokens."
    )


def _row(known: Losses, trained_on: str | None, form: str, found: list[float]) -> str:
    values = [loss for (_, *which), loss in known.items() if which == [trained_on, form]]
    target = _TARGETS.get((trained_on, form))
    each = "" if len(found) == 1 else f"{min(found):+.2%} to {max(found):+.2%}"
    cells = [
        trained_on or "no adapter", form, f"{mean(values):.4f}", f"{mean(found):+.2%}", each,
        "" if target is None else f"≤ {target:.1%}",
        "" if target is None else ("met" if max(found) <= target else "missed"),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def rounding(records: list[Record]) -> str:
    """How far each way to round the gradient of logits leads what a head passes on astray."""
    last = {r["way"]: r for r in records if r.get("kind") == LOGITS}
    if not last:
        return ""
    lines = [
        "| products by the head | error of dX | of the last norm's gradient |",
        "| --- | ---: | ---: |",
        *(f"| {way} | {r['dx']:.2%} | {r['gain']:.2%} |" for way, r in last.items()),
    ]
    one = next(iter(last.values()))
    setting = (
        f"{one['tokens']:,} held-out tokens of a vocabulary of {one['words']:,}, at a loss of"
        f" {one['loss']:.2f}; relative to fp64."
    )
    return "\n".join([*lines, "", setting, ""])


def _last_run(records: list[Record]) -> str:
    return [record["run"] for record in records if record.get("kind") == KIND][-1]


def sizes(records: list[Record]) -> str:
    """Bytes and errors of one layer's weights in each format."""
    last = {r["form"]: r for r in records if r.get("kind") == SIZES}
    if not last:
        return ""
    lines = [
        "| format | bytes, of 16 bits | target | | signal to noise, dB |",
        "| --- | ---: | ---: | --- | ---: |",
    ]
    for form, record in last.items():
        share, most = record["of_16_bits"], _MOST_BYTES[form]
        low, high = record["snr_db"]
        verdict = "met" if share <= most else "missed"
        lines.append(f"| {form} | {share:.4f} | ≤ {most} | {verdict} | {low:.1f} to {high:.1f} |")
    model = next(iter(last.values()))["model"]
    return "\n".join([*lines, "", f"One layer of {model}, normal weights.", ""])
