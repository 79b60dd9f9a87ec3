"""Tables of docs/gpu.md: what `bench.gpu` measured, beside what was predicted of it.

Of each section the last run on a GPU counts, and of that run all rows.
"""

from collections.abc import Callable, Sequence

from artemis.benchmark.records import Record

from .gpu.predicted import compared, gpu_named

_OURS = "artemis"


def origin(records: list[Record]) -> str:
    """Where and with what each section was measured."""
    lines = {}
    for section in dict.fromkeys(r["section"] for r in records if "section" in r):
        head, rows = _last(records, section)
        if rows:
            lines.setdefault(_about(head), []).append(section)
    return "".join(f"- {', '.join(sections)}: {about}.\n" for about, sections in lines.items())


def _about(head: Record) -> str:
    versions = ", ".join(
        f"{name} {head['versions'][name]}"
        for name in ("python", "torch", "triton", "transformers", "peft")
        if head["versions"].get(name)
    )
    gpu = head["gpu"]
    return f"{gpu['name']}, driver {gpu['driver']}; {versions}; code `{head['code']}`, {_day(head)}"


def _day(head: Record) -> str:
    return head["time"][:10]


def _last(records: list[Record], section: str) -> tuple[Record, list[Record]]:
    """The head and rows of the last run on a GPU that has rows of a section."""
    heads = {
        r["run"]: r for r in records if r.get("kind") == "run" and r.get("gpu") and not r["tiny"]
    }  # fmt: skip
    mine = [
        r for r in records
        if r.get("section") == section and r["kind"] != "end" and r["run"] in heads
    ]  # fmt: skip
    if not mine:
        return {}, []
    last = mine[-1]["run"]
    return heads[last], [row for row in mine if row["run"] == last]


def accuracy(records: list[Record]) -> str:
    """Cases by what was proved, and the largest error over its limit."""
    _, rows = _last(records, "accuracy")
    groups: dict[tuple[str, str], list[Record]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["dtype"]), []).append(row)
    lines = [
        (
            f"`{op}`", dtype, str(len(each)),
            str(sum(row["passed"] is not True for row in each)),
            _number(max((r["ratio"] for r in each if r["ratio"] is not None), default=None)),
        )
        for (op, dtype), each in groups.items()
    ]  # fmt: skip
    return _table(
        ["operation", "dtype", "cases", "not passed", "largest error ÷ its limit"], lines, 2
    )


def training(records: list[Record]) -> str:
    """A step of two layers of Llama 2 7B's width, or a whole small model: time and speed."""
    head, rows = _last(records, "models")
    rows = [row for row in rows if row["kind"] == "train" and "ms" in row]
    lines = []
    for row in rows:
        predicted = _predicted(row, head)
        lines.append(
            (
                f"{row['model']}, {row['layers']} layers", f"{row['tokens']:,}", f"`{row['arm']}`",
                _number(row["ms"]["p50"]), _number(row.get("busy_ms")), _graph(row),
                _of_full(row["speedup"]), _of_full(row.get("busy_speedup")),
                _of_full(row.get("graph_speedup")),
                _number(predicted), _number(row["peak_gb"]),
            )
        )  # fmt: skip
    titles = [
        "model", "tokens a step", "arm", "ms", "GPU busy, ms", "as a CUDA graph, ms",
        "× full bf16", "× by busy time", "× as graphs", "predicted ×", "peak GB",
    ]  # fmt: skip
    return _table(titles, lines, 3)


def decoding(records: list[Record]) -> str:
    """A token after each of one or 16 prompts, as a CUDA graph."""
    head, rows = _last(records, "models")
    lines = [
        (
            f"{row['model']}, {row['layers']} layers", str(row["tokens"]), f"`{row['arm']}`",
            _number(row["ms"]["p50"]), _number(row["eager_ms"]["p50"]),
            _of_full(row["speedup"]),
            _number(_predicted(row, head)),
        )
        for row in rows
        if row["kind"] == "decode" and "ms" in row
    ]  # fmt: skip
    titles = ["model", "prompts", "arm", "ms a token", "eager ms", "× plain bf16", "predicted ×"]
    return _table(titles, lines, 3)


def layers(records: list[Record]) -> str:
    """LoRA of one layer, forward and all gradients, beside its peers."""
    head, rows = _last(records, "kernels")
    cases = _cases(
        [row for row in rows if row["kind"] == "kernel" and row["op"] == "lora_linear"],
        ("m", "k", "n", "dropout", "pass"),
    )
    lines = []
    for (m, k, n, dropout, which), by in cases.items():
        ours = by.get(_OURS, {})
        if which != "both" or "ms" not in ours:
            continue
        lines.append(
            (
                f"{k} → {n}", f"{m:,}", f"{dropout:g}", ours["strategy"],
                *_speeds(by, ours, ("peft", "plain", "compile")), _ratio(ours, by.get("bare")),
                _predicted_speed(by, head), _ratio(by.get("peft"), by.get("artemis, fp8")),
            )
        )  # fmt: skip
    titles = [
        "layer", "rows", "dropout", "strategy", "ms", "× PEFT", "× plain torch",
        "× `torch.compile`", "÷ bare products", "predicted × PEFT", "over fp8: × PEFT",
    ]  # fmt: skip
    return _table(titles, lines, 4)


def groups(records: list[Record]) -> str:
    """Layers that read one x, forward and all gradients."""
    head, rows = _last(records, "groups")
    rows = [row | {"outs": tuple(row["outs"])} for row in rows if row["kind"] == "group"]
    cases = _cases(rows, ("members", "rows", "k", "outs", "dropout"))
    lines = []
    for (members, count, k, outs, dropout), by in cases.items():
        ours = by.get("artemis, group", {})
        if "ms" not in ours:
            continue
        lines.append(
            (
                members, f"{k} → {', '.join(map(str, outs))}", f"{count:,}", f"{dropout:g}",
                *_speeds(by, ours, ("peft", "artemis, one by one")), _ratio(ours, by.get("bare")),
                _predicted_speed(by, head, "artemis, group"),
            )
        )  # fmt: skip
    titles = [
        "members", "layers", "rows", "dropout", "ms", "× PEFT", "× one by one",
        "÷ bare products", "predicted × PEFT",
    ]  # fmt: skip
    return _table(titles, lines, 4)


def bottlenecks(records: list[Record]) -> str:
    """Bottlenecks: alone beside the copy's bandwidth, and on a layer, folded or plain."""
    _, rows = _last(records, "kernels")
    wanted = [r for r in rows if r["kind"] == "kernel" and r["op"] != "lora_linear"]
    lines = []
    for (op, m, k, n, dropout, which), by in _cases(
        wanted, ("op", "m", "k", "n", "dropout", "pass")
    ).items():
        ours = by.get(_OURS, {})
        if "ms" in ours:
            lines.append(
                (
                    f"`{op}`", f"{k} → {n}", f"{m:,}", f"{dropout:g}", which, ours["strategy"],
                    *_speeds(by, ours, ("plain",)), _number(ours.get("of_copy")),
                )
            )  # fmt: skip
    titles = [
        "operation", "layer", "rows", "dropout", "pass", "strategy", "ms", "× plain torch",
        "of the copy's bandwidth",
    ]  # fmt: skip
    return _table(titles, lines, 6)


def packed(records: list[Record]) -> str:
    """LoRA over packed bases: speed of the bare product of the 16-bit weight."""
    head, rows = _last(records, "packed")
    rows = [row for row in rows if row["kind"] == "packed"]
    formats = ("16 bits", "int8", "fp8", "int4")
    lines = []
    for (count, k, n, backward), by in _cases(rows, ("rows", "k", "n", "backward")).items():
        bare = by.get("bare")
        cells = []
        for format in formats:
            ours = by.get(f"artemis, {format}")
            told = compared(ours, gpu_named(head["gpu"]["name"])) if ours and bare else {}
            expected = bare["ms"]["p50"] / told["predicted"] if "predicted" in told else None
            cells += [f"{_ratio(bare, ours)} ({_number(expected)})"]
        which = "with gradients" if backward else "forward"
        lines.append((f"{k} → {n}", f"{count:,}", which, *cells))
    return _table(["layer", "rows", "pass", *formats], lines, 3)


def products(records: list[Record]) -> str:
    """The product with its low-rank term three ways, and bare: TFLOP/s."""
    _, rows = _last(records, "products")
    ways = ("bare", "artemis, descriptors", "artemis, pointers", "artemis, vendor, then update")
    lines = [
        (
            f"{k} → {n}, rank {r}", f"{m:,}", "dX" if back else "forward",
            *(f"{by[way]['tflops']:.0f}" if "ms" in by.get(way, {}) else "" for way in ways),
        )
        for (m, k, n, r, back), by in _cases(rows, ("m", "k", "n", "r", "back")).items()
    ]  # fmt: skip
    return _table(["layer", "rows", "pass", *(way.split(", ", 1)[-1] for way in ways)], lines, 3)


def loss(records: list[Record]) -> str:
    """A language model's loss and its gradient beside torch on logits in fp32."""
    _, rows = _last(records, "groups")
    cases = _cases([row for row in rows if row["kind"] == "loss"], ("rows", "classes"))
    lines = [
        (f"{count:,}", f"{classes:,}", *_speeds(by, by[_OURS], ("torch",)))
        for (count, classes), by in cases.items()
        if "ms" in by.get(_OURS, {})
    ]
    return _table(["rows", "classes", "ms", "× torch"], lines, 2)


def between(records: list[Record]) -> str:
    """Norms, gates and rotary embeddings beside torch's composition and the copy's bandwidth."""
    _, rows = _last(records, "groups")
    rows = [row for row in rows if row["kind"] == "between"]
    lines = [
        (
            f"`{op}`", f"{what}, {size}", which, *_speeds(by, by[_OURS], ("torch",)),
            _number(by[_OURS]["of_copy"]), _number(by.get("torch", {}).get("of_copy")),
        )
        for (op, what, size, which), by in _cases(rows, ("op", "what", "size", "pass")).items()
        if "ms" in by.get(_OURS, {})
    ]  # fmt: skip
    titles = ["operation", "of", "pass", "ms", "× torch", "of the copy's bandwidth", "torch's"]
    return _table(titles, lines, 3)


def kernels(records: list[Record]) -> str:
    """What a GPU spends a training step of 8,192 tokens on: the longest kernels of each arm."""
    _, rows = _last(records, "models")
    lines = [
        (f"`{row['arm']}`", f"`{_kernel_name(name)}`", str(count), _number(ms))
        for row in rows
        if row["kind"] == "train" and row["model"] == "llama-2-7b" and row["tokens"] == 8192
        for name, count, ms in row.get("kernels", [])[:6]
    ]
    return _table(["arm", "kernel", "launches", "ms"], lines, 2)


def short(records: list[Record]) -> str:
    """Speeds of full fine-tuning in bf16 on the widest model, for a reader in a hurry."""
    head, rows = _last(records, "models")
    wide = [r for r in rows if r["kind"] == "train" and r["model"] == "llama-2-7b" and "ms" in r]
    lines = []
    for row in wide:
        if row["arm"] in ("peft", "hybrid", "hybrid-fp8", "hybrid-int8"):
            speeds = (row["speedup"], row.get("busy_speedup"), row.get("graph_speedup"))
            lines.append(
                (f"{row['tokens']:,}", f"`{row['arm']}`", *(_of_full(one) for one in speeds))
            )
    if not lines:
        return ""
    titles = ["tokens a step", "arm", "× as Python runs it", "× by busy time", "× as a CUDA graph"]
    lines.sort(key=lambda line: int(line[0].replace(",", "")))
    about = f"{head['gpu']['name']}, two layers of Llama 2 7B's width; code `{head['code']}`"
    return _table(titles, lines, 2) + f"\n{about}, {_day(head)}.\n"


def _of_full(speeds: Record | None) -> str:
    """Against full fine-tuning in bf16: a number, or the middle of a spread."""
    found = (speeds or {}).get("full-bf16")
    return _number(found["p50"] if isinstance(found, dict) else found)


def _kernel_name(name: str) -> str:
    """A kernel's name without what its templates were given, as far as it tells anything."""
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return plain.split("<")[0].split("(")[0][:60]


def _cases(rows: Sequence[Record], keys: Sequence[str]) -> dict[tuple, dict[str, Record]]:
    """Rows by case and provider."""
    cases: dict[tuple, dict[str, Record]] = {}
    for row in rows:
        if "provider" in row and all(key in row for key in keys):
            cases.setdefault(tuple(row[key] for key in keys), {})[row["provider"]] = row
    return cases


def _speeds(by: dict[str, Record], ours: Record, peers: Sequence[str]) -> list[str]:
    """Our time, and how many times as long each peer takes."""
    return [_number(ours["ms"]["p50"]), *(_ratio(by.get(peer), ours) for peer in peers)]


def _ratio(one: Record | None, other: Record | None) -> str:
    if one is None or other is None or "ms" not in one or "ms" not in other:
        return ""
    return _number(one["ms"]["p50"] / other["ms"]["p50"])


def _predicted(row: Record, head: Record) -> float | None:
    gpu = gpu_named(head["gpu"]["name"])
    return compared(row, gpu).get("predicted") if gpu else None


def _predicted_speed(by: dict[str, Record], head: Record, ours: str = _OURS) -> str:
    """PEFT's predicted time over ours."""
    times = [_predicted(by[who], head) if who in by else None for who in ("peft", ours)]
    return "" if None in times else _number(times[0] / times[1])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _graph(row: Record) -> str:
    return _number(row["graph_ms"]["p50"]) if "graph_ms" in row else ""


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]], texts: int) -> str:
    """Markdown, the first `texts` columns to the left; nothing where there are no lines."""
    if not lines:
        return ""
    rule = " --- |" * texts + " ---: |" * (len(titles) - texts)
    rows = [f"| {' | '.join(cells)} |" for cells in (titles, *lines)]
    return "\n".join([rows[0], f"|{rule}", *rows[1:]]) + "\n"


SECTIONS: dict[str, Callable[[list[Record]], str]] = {
    "gpu-short": short,
    "gpu-origin": origin,
    "gpu-accuracy": accuracy,
    "gpu-training": training,
    "gpu-kernels": kernels,
    "gpu-decoding": decoding,
    "gpu-layers": layers,
    "gpu-groups": groups,
    "gpu-bottlenecks": bottlenecks,
    "gpu-packed": packed,
    "gpu-products": products,
    "gpu-loss": loss,
    "gpu-between": between,
}
