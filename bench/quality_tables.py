"""The tables of docs/quality.md, from what `artemis bench quality` wrote."""

from artemis.benchmark.quality.arms import FAMILIES
from artemis.benchmark.quality.results import Dataset, datasets
from artemis.benchmark.quality.tables import markdown
from artemis.benchmark.records import Record


def summary(records: list[Record]) -> str:
    """For every setting: arms, comparisons, targets, and what was run."""
    settings: dict[str, list[Record]] = {}
    for record in records:
        if record.get("kind") == "quality":
            settings.setdefault(str(record["setting"]), []).append(record)
    return "\n".join(_setting(cells, records) for cells in settings.values())


def _setting(cells: list[Record], records: list[Record]) -> str:
    found = datasets(cells)
    setting = cells[0]["setting"]
    counts = "; ".join(_counts(each) for each in found)
    examples = f"{setting['examples']:,}" if setting["examples"] else "all"
    heads = [r for r in records if r.get("kind") == "run"]
    head = next(r for r in heads if r["run"] == cells[-1]["run"])
    return (
        f"{markdown(found)}\n\n{counts}. {setting['model']} in {setting['precision']}, texts cut at"
        f" {setting['length']} tokens; a run: {examples} training examples, {setting['epochs']}"
        f" epoch, {setting['batch_size']} examples a step. {head['processor']['name']},"
        f" {head['threads']} thread, torch {head['versions']['torch']}, {head['time'][:10]}."
        " \\* at the end of the rates that were tried.\n"
    )


def _counts(each: Dataset) -> str:
    cell = next(cell for cells in each.cells.values() for cell in cells.values())
    return f"{each.name}: {cell['items']:,} test items"


def trials(records: list[Record]) -> str:
    """Held-out accuracy of every setting that was tried, in per cent."""
    last = {
        (r["dataset"], r["family"], r["choice"]): r["accuracy"]
        for r in records
        if r.get("kind") == "quality-trial"
    }
    if not last:
        return ""
    lines = ["| data | family | tried: accuracy, % |", "| --- | --- | --- |"]
    for dataset in dict.fromkeys(key[0] for key in last):
        for family, about in FAMILIES.items():
            known = [c for c in about.trials if (dataset, family, c) in last]
            cells = ", ".join(f"{c:.0e}: {100 * last[dataset, family, c]:.1f}" for c in known)
            if known:
                lines.append(f"| {dataset} | {family} | {cells} |")
    return "\n".join(lines) + "\n"
