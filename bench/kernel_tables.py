"""The table of single operations, an operation a row, from the rows of `artemis bench kernels`."""

from collections.abc import Callable, Sequence

from artemis.benchmark.records import Record
from artemis.benchmark.tables import Column, filled, piped

#: What makes rows of several providers one row.
_WORK = ("op", "layer", "m", "k", "n", "r", "dropout", "pass", "dtype")
_OWN, _FROZEN = "artemis", "artemis, frozen"
_PASSES = {"both": "forward and backward", "forward": "forward", "backward": "backward"}
_PEERS = {
    "plain": "plain torch",
    "addmm": "addmm",
    "compile": "torch.compile",
    "peft": "PEFT",
}
#: Provider -> title of its milliseconds.
_TRAINING = {
    "bare": "bare, ms",
    _OWN: "Artemis",
    "artemis, one by one": "one by one",
    "artemis, int8": "int8",
    "artemis, int4": "int4",
    **_PEERS,
}
_INFERENCE = {
    "bare": "bare, ms",
    _FROZEN: "Artemis",
    "artemis, int8, frozen": "int8",
    "artemis, int4, frozen": "int4",
    _OWN: "constants anew",
    **_PEERS,
}


def table(rows: Sequence[Record]) -> str:
    """Artemis' ratios to the best peer and to the floor, and the milliseconds they are of.

    The operations as training calls them, and layers at inference; a table a pass.
    """
    works: dict[tuple, dict[str, Record]] = {}
    for row in rows:
        works.setdefault(tuple(row[name] for name in _WORK), {})[row["provider"]] = row
    merged = [{**next(iter(by.values())), "by": by} for by in works.values()]
    merged.sort(key=lambda row: (row["m"], row["op"]))
    inference = [row for row in merged if _FROZEN in row["by"]]
    training = [row for row in merged if _FROZEN not in row["by"]]
    kinds = (
        ("The operations, called with their parameters", _OWN, _TRAINING, training),
        ("Layers at inference, constants made beforehand", _FROZEN, _INFERENCE, inference),
    )
    return "\n\n".join(
        f"{title}, {_PASSES[which]}:\n\n{piped(filled(_columns(own, providers), found), found)}"
        for title, own, providers, rows in kinds
        for which, found in _by_pass(rows).items()
    )


def _by_pass(rows: Sequence[Record]) -> dict[str, list[Record]]:
    passes: dict[str, list[Record]] = {}
    for row in rows:
        passes.setdefault(row["pass"], []).append(row)
    return passes


def _ms(provider: str) -> Callable[[Record], str]:
    def cell(row: Record) -> str:
        found = row["by"].get(provider, {})
        if not found.get("gate", {"passed": True})["passed"]:
            return "inaccurate"
        return f"{found['ms']['p50']:,.3g}" if "ms" in found else ""

    return cell


def _ratio(provider: str, name: str, invert: bool = False) -> Callable[[Record], str]:
    def cell(row: Record) -> str:
        value = row["by"].get(provider, {}).get(name)
        return "" if value is None else f"{1 / value if invert else value:.2f}"

    return cell


def _floor(own: str) -> Callable[[Record], str]:
    def cell(row: Record) -> str:
        found = row["by"].get(own, {})
        return f"{found['ms']['p50'] / found['over_floor']:,.3g}" if "ms" in found else ""

    return cell


def _columns(own: str, providers: dict[str, str]) -> tuple[Column, ...]:
    int8 = own.replace(_OWN, f"{_OWN}, int8")
    return (
        Column("operation", lambda row: f"`{row['op']}`, {row['layer']}", words=True),
        Column("tokens × in × out, rank", lambda row: "{m:,} × {k:,} × {n:,}, {r}".format(**row)),
        Column("× best peer", _ratio(own, "over_best_peer", invert=True)),
        Column("int8: × best peer", _ratio(int8, "over_best_peer", invert=True)),
        Column("÷ floor", _ratio(own, "over_floor")),
        Column("floor, ms", _floor(own)),
        *(Column(title, _ms(provider)) for provider, title in providers.items()),
    )
