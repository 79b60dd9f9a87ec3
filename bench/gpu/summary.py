"""The tables of one run of `bench.gpu`, of what it has so far."""

from typing import Any

from . import predicted

Row = dict[str, Any]
#: (Section, kind of its rows) -> title, titles of the columns, key of each cell.
_TABLES = {
    ("products", "product"): (
        "Products with a low-rank epilogue, by pointers, descriptors and the vendor's GEMM",
        "m|k|n|r|dX|provider|ms|of graphs|TFLOP/s|÷ pointers|error",
        "m k n r back provider ms graph tflops over_pointers error",
    ),
    ("tuning", "tuning"): (
        "Tuning: what was chosen and what is usual",
        "operation|part|case or kernel and shape|chosen|usual|milliseconds (20 %, median, 80 %)"
        "|not done",
        "op part key chosen usual times where",
    ),
    ("kernels", "kernel"): (
        "Operations",
        "operation|m|k|n|r|dropout|pass|provider|strategy|ms|of graphs|eager ms|GFLOP/s|GB/s"
        "|÷ floor|÷ best peer|of a copy|predicted ms|÷ predicted|error",
        "op m k n r dropout pass provider strategy ms graph eager_ms gflops gbs over_floor"
        " over_best_peer of_copy predicted over_predicted error",
    ),
    ("groups", "group"): (
        "Layers that read one x",
        "members|rows|in|outs|r|dropout|provider|ms|of graphs|eager ms|÷ group|predicted ms"
        "|÷ predicted|error ÷ limit",
        "members rows k outs r dropout provider ms graph eager_ms over_joined predicted"
        " over_predicted error",
    ),
    ("groups", "loss"): (
        "The loss of a language model, forward and backward",
        "rows|classes|provider|ms|of graphs|eager ms|× torch|error ÷ limit",
        "rows classes provider ms graph eager_ms over_torch error",
    ),
    ("groups", "between"): (
        "Between the products of Llama 2 7B",
        "operation||size|pass|provider|ms|of graphs|eager ms|× torch|GB/s|of a copy|error ÷ limit",
        "op what size pass provider ms graph eager_ms over_torch gbs of_copy error",
    ),
    ("packed", "packed"): (
        "LoRA over a packed base",
        "rows|in|out|backward|base|strategy|ms|of graphs|÷ 16-bit bare|predicted ms|÷ predicted"
        "|error ÷ limit",
        "rows k n backward provider strategy ms graph over_bare predicted over_predicted error",
    ),
    ("models", "train"): (
        "Training step",
        "model|layers|tokens|arm|ms|GPU busy ms|of the time|× full bf16 autocast|× full bf16"
        "|× full bf16 by busy time|predicted ×|÷ predicted|ms as a graph|× full bf16 as a graph"
        "|tokens/s|peak GB|trained parameters|error ÷ limit",
        "model layers tokens arm ms busy_ms busy_share full-autocast full-bf16 busy predicted"
        " over_predicted graph_ms replayed tokens_per_second peak_gb trained_parameters error",
    ),
    ("models", "decode"): (
        "Decoding, adapters unmerged",
        "model|layers|prompts|arm|ms a token|of graphs|eager ms|× plain bf16|predicted ×"
        "|÷ predicted|tokens/s|peak GB|error ÷ limit",
        "model layers tokens arm ms graph eager_ms full-bf16 predicted over_predicted"
        " tokens_per_second peak_gb error",
    ),
}
_KERNELS = 8  # of a step that are shown; rows have more
#: Kind -> what stands above its table.
_NOTES = {
    "train": [
        "A step whose GPU is busy for much less than its time waits for Python: its speed says what"
        " launches cost. Predictions reckon products alone, and stand beside speeds by busy time.",
        "",
    ],
    "decode": [
        "Of graphs: what Python costs a token is left out, and stands in *eager*. Predictions"
        " reckon products alone.",
        "",
    ],
}  # fmt: skip


def summary(header: Row, states: dict[str, str], rows: dict[str, list[Row]]) -> str:
    """Markdown: origin, how each section ended, and its table."""
    about = predicted.gpu_named((header["gpu"] or {"name": ""})["name"])
    gpu = header["gpu"] or {"name": "CPU, Triton interpreted", "driver": None}
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    lines = [
        "# What a GPU showed", "",
        f"{gpu['name']}, driver {gpu['driver']}; {versions}; commit {_commit(header)}, code"
        f" {header['code']}; {header['time']}; run {header['run']}.", "",
        *(f"- {name}: {state}" for name, state in states.items()),
    ]  # fmt: skip
    lines += _accuracy(rows.get("accuracy", []))
    for (name, kind), (title, columns, keys) in _TABLES.items():
        lines += ["", f"## {title}", ""]
        lines += [*_NOTES.get(kind, []), *_peaks(rows.get(name, []), about)]
        lines += _header(columns.split("|"))
        for row in rows.get(name, []):
            if row["kind"] == kind:
                compared = row | (predicted.compared(row, about) if about else {})
                lines.append(_line(*(_cell(compared, key) for key in keys.split())))
    lines += _kernels(rows.get("models", []))
    return "\n".join(lines) + "\n"


def _commit(header: Row) -> str:
    if header["commit"] is None:
        return "unknown"
    return f"{header['commit']}{' with changes' if header['dirty'] else ''}"


def _peaks(rows: list[Row], gpu: predicted.Gpu | None) -> list[str]:
    lines = []
    for row in rows:
        if row["kind"] == "peaks":
            lines.append(f"Peaks: {row['gflops'] / 1e3:.4g} TFLOP/s, copy {row['gbs']:.4g} GB/s.")
            lines += [predicted.rates(row, gpu)] if gpu else []
            lines.append("")
    return lines


def _accuracy(rows: list[Row]) -> list[str]:
    lines = ["", "## Accuracy: largest error over its limit (passes up to 1)", ""]
    titles = "operation|strategy|dtype|cases|failed|did not run|worst|where"
    lines += _header(titles.split("|"))
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["strategy"], row["dtype"]), []).append(row)
    for key, each in groups.items():
        worst = max(each, key=_badness)
        count = [sum(row["passed"] is verdict for row in each) for verdict in (False, None)]
        sizes = "×".join(str(size) for size in worst["sizes"].values())
        where = f"{worst['where']} at {sizes}, dropout {worst['dropout']}"
        lines.append(_line(*key, len(each), *count, worst["ratio"], where))
    return lines


def _kernels(rows: list[Row]) -> list[str]:
    """What each arm's GPU spends a step on, of every row that says so."""
    lines = ["", "## Kernels of a training step, longest first", ""]
    lines += _header(["model", "layers", "tokens", "arm", "launches", "ms", "kernel"])
    for row in rows:
        for name, launches, ms in row.get("kernels", [])[:_KERNELS]:
            about = (row[key] for key in ("model", "layers", "tokens", "arm"))
            lines.append(_line(*about, launches, ms, name[:80]))
    return lines


def _badness(row: Row) -> float:
    """What did not run counts least, what is wrong beyond measure most."""
    if row["passed"] is None:
        return -1.0
    return float("inf") if row["ratio"] is None else row["ratio"]


def _cell(row: Row, key: str) -> Any:
    """Speeds against full fine-tuning, keyed by its arm, are shown with their spread."""
    if key == "ms":
        return row["ms"]["p50"] if "ms" in row else f"not timed: {row.get('where')}"
    if key in ("eager_ms", "graph_ms"):
        return row[key]["p50"] if key in row else None
    if key == "busy":
        return row.get("busy_speedup", {}).get("full-bf16")
    if key == "replayed":
        return row.get("graph_speedup", {}).get("full-bf16", {}).get("p50")
    if key.startswith("full-"):
        speed = row.get("speedup", {}).get(key)
        return speed and "{p50:.3g} ({p20:.3g}–{p80:.3g})".format(**speed)
    return row.get(key)


def _header(titles: list[str]) -> list[str]:
    return [_line(*titles), "|" + " --- |" * len(titles)]


def _line(*cells: Any) -> str:
    shown = (_shown(cell).replace("\n", " ").replace("|", "/") for cell in cells)
    return f"| {' | '.join(shown)} |"


def _shown(cell: Any) -> str:
    if cell is None or isinstance(cell, bool):
        return {None: "", True: "yes", False: "no"}[cell]
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
