"""The demo's table: one column for each arm, one row for each measure."""

from collections.abc import Mapping

from artemis.text_table import aligned

ARMS = {
    "frozen": "frozen base",
    "full": "full fine-tuning",
    "hybrid": "hybrid adapter",
    "hybrid_int8": "hybrid, 8-bit base",
}
LOSSES = ("new_loss", "old_loss")
NONE = "-"
MEGA = 10**6

Measures = Mapping[str, Mapping[str, float]]


def share_of_improvement(results: Measures, arm: str = "hybrid") -> float | None:
    """How much of full fine-tuning's gain on the new text an arm reaches.

    None where full fine-tuning gained nothing, so that there is nothing to have a share of.
    """
    start = results["frozen"]["new_loss"]
    gain = start - results["full"]["new_loss"]
    return (start - results[arm]["new_loss"]) / gain if gain > 0 else None


def render(results: Measures) -> str:
    """The table as text, a column for each arm that there are results of."""
    results = {arm: results[arm] for arm in ARMS if arm in results}
    change = _changes_from_frozen(results)
    rows = [
        ["", *(ARMS[arm] for arm in results)],
        _row("trained parameters", results, "trainable_parameters", "{:,}"),
        _row("training tokens per second", results, "tokens_per_second", "{:,.0f}"),
        _row("peak memory of the process", results, "peak_memory_bytes", "{:,} MB", MEGA),
        _row("  of it for model and training", results, "training_memory_bytes", "{:,} MB", MEGA),
        _row("saved", results, "saved_bytes", "{:,} MB", MEGA),
        _row("loss on the new text", results, "new_loss", "{:.4f}"),
        _row("  change", change, "new_loss", "{:+.4f}"),
        ["  share of full's improvement", *(_share(results, arm) for arm in results)],
        _row("loss on the old text", results, "old_loss", "{:.4f}"),
        _row("  change (above 0: forgotten)", change, "old_loss", "{:+.4f}"),
    ]
    head, *lines = aligned(rows, left=1)
    return "\n".join([head, "-" * len(head), *lines])


def _row(label: str, results: Measures, key: str, form: str, unit: int | None = None) -> list[str]:
    """A label and every arm's cell; `unit` divides, keeping one decimal."""
    cells = [label]
    for values in results.values():
        value = values.get(key)
        if value is not None and unit is not None:
            value = round(value / unit, 1)
        cells.append(NONE if value is None else form.format(value))
    return cells


def _changes_from_frozen(results: Measures) -> Measures:
    start = results["frozen"]
    return {
        arm: {} if arm == "frozen" else {key: results[arm][key] - start[key] for key in LOSSES}
        for arm in results
    }


def _share(results: Measures, arm: str) -> str:
    share = None if arm == "frozen" else share_of_improvement(results, arm)
    return NONE if share is None else f"{share:.1%}"
