"""The table of single operations, an operation a row, from the rows of `artemis bench kernels`."""

from collections.abc import Callable, Sequence
from typing import Any

from artemis.benchmark.tables import Column, piped

Record = dict[str, Any]
#: What makes rows of several providers one row.
_WORK = ("op", "layer", "m", "k", "n", "r", "dropout", "pass", "dtype")
_OWN = "artemis"
#: Provider -> title of its milliseconds.
_PROVIDERS = {
    "bare": "bare, ms",
    _OWN: "Artemis",
    "artemis, one by one": "one by one",
    "artemis, int8": "int8",
    "artemis, int4": "int4",
    "plain": "plain torch",
    "addmm": "addmm",
    "compile": "torch.compile",
    "peft": "PEFT",
}


def table(rows: Sequence[Record]) -> str:
    """Milliseconds of everybody, the floor, and Artemis' ratios to it and to the best peer."""
    works: dict[tuple, dict[str, Record]] = {}
    for row in rows:
        works.setdefault(tuple(row[name] for name in _WORK), {})[row["provider"]] = row
    merged = [{**next(iter(by.values())), "by": by} for by in works.values()]
    merged.sort(key=lambda row: (row["m"], row["op"]))
    return piped(_COLUMNS, merged)


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


def _floor(row: Record) -> str:
    own = row["by"].get(_OWN, {})
    return f"{own['ms']['p50'] / own['over_floor']:,.3g}" if "ms" in own else ""


_COLUMNS = (
    Column("operation", lambda row: f"`{row['op']}`", words=True),
    Column("layer", lambda row: row["layer"], words=True),
    Column("tokens × in × out, rank", lambda row: "{m:,} × {k:,} × {n:,}, {r}".format(**row)),
    Column("pass", lambda row: row["pass"], words=True),
    Column("floor, ms", _floor),
    *(Column(title, _ms(provider)) for provider, title in _PROVIDERS.items()),
    Column("× best peer", _ratio(_OWN, "over_best_peer", invert=True)),
    Column("÷ floor", _ratio(_OWN, "over_floor")),
    Column("int8: × best peer", _ratio("artemis, int8", "over_best_peer", invert=True)),
)
