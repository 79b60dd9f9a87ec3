"""Tables of what was measured, as text for a terminal or as Markdown for a document."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .records import Record

GIGA = 1e9


class Column(NamedTuple):
    """A title, and the cell of a row; words stand on the left, numbers on the right."""

    title: str
    cell: Callable[[Record], str]
    words: bool = False


def _at(*path: str, form: str = "{:,.2f}", unit: float | None = None) -> Callable[[Record], str]:
    """The number at a path of keys, or nothing where it is missing."""

    def cell(row: Record) -> str:
        value: Any = row
        for key in path:
            value = value.get(key) if value else None
        if value is not None and unit is not None:
            value /= unit
        return "" if value is None else form.format(value)

    return cell


def _spread(row: Record) -> str:
    return f"{row['ms']['p20']:,.0f}–{row['ms']['p80']:,.0f}" if "ms" in row else ""


def _what(row: Record) -> str:
    return row["what"] + (f" (no figure: {row['failed']})" if "failed" in row else "")


_MODEL = (
    Column("model", lambda row: row["model"], words=True),
    Column("tokens a step", _at("tokens", form="{:,}")),
    Column("sequence", _at("sequence", form="{:,}")),
    Column("arm", _what, words=True),
)
#: How many of the columns of whole models say the model and its batch.
_SETTING = 3
_MEMORY = tuple(
    Column(f"{name}, GB", _at("memory", name, unit=GIGA)) for name in ("states", "activations")
)
COLUMNS: dict[str, tuple[Column, ...]] = {
    "train": (
        *_MODEL,
        Column("ms a step", _at("ms", "p50", form="{:,.0f}")),
        Column("p20–p80", _spread),
        Column("samples/s", _at("samples_per_second", form="{:,.3g}")),
        Column("× full bf16 autocast", _at("speedup", "full-autocast")),
        Column("× full fp32", _at("speedup", "full-fp32")),
        Column("× full bf16", _at("speedup", "full-bf16")),
        *_MEMORY,
        Column("FLOPs", _at("flops_relative", form="{:.0%}")),
        Column("device-seconds", _at("device_seconds_relative", form="{:.0%}")),
    ),
    "memory": (
        *_MODEL,
        *_MEMORY,
        Column("peak, GB", _at("memory", "peak", unit=GIGA)),
        Column("of full bf16 autocast", _at("peak_of", "full-autocast", form="{:.0%}")),
        Column("of full bf16", _at("peak_of", "full-bf16", form="{:.0%}")),
        Column("of it checkpointed", _at("peak_of", "full-bf16-checkpointed", form="{:.0%}")),
    ),
    "decode": (
        _MODEL[0],
        Column("batch", _at("batch", form="{:,}")),
        Column("prompt", _at("sequence", form="{:,}")),
        _MODEL[3],
        Column("prefill tokens/s", _at("prefill", "tokens_per_second", form="{:,.0f}")),
        Column("× plain bf16", _at("prefill", "speedup", "full-bf16")),
        Column("× plain fp32", _at("prefill", "speedup", "full-fp32")),
        Column("decode tokens/s", _at("decode", "tokens_per_second", form="{:,.4g}")),
        Column("× plain bf16", _at("decode", "speedup", "full-bf16")),
        Column("× plain fp32", _at("decode", "speedup", "full-fp32")),
    ),
    "kernels": (
        Column("operation", lambda row: row["op"], words=True),
        Column("layer", lambda row: row["layer"], words=True),
        Column("tokens × in × out, rank", lambda row: "{m:,} × {k:,} × {n:,}, {r}".format(**row)),
        Column("dropout", _at("dropout", form="{:g}")),
        Column("pass", lambda row: row["pass"], words=True),
        Column("provider", lambda row: row["provider"], words=True),
        Column("ms", _at("ms", "p50", form="{:,.3g}")),
        Column("GFLOP/s", _at("gflops", form="{:,.0f}")),
        Column("GB/s", _at("gbs", form="{:,.1f}")),
        Column("÷ floor", _at("over_floor")),
        Column("÷ best peer", _at("over_best_peer")),
        Column("error", _at("error", form="{:.1e}")),
    ),
}


def text(table: str, rows: Sequence[Record]) -> str:
    """Aligned columns under their titles, and how each model was measured; a table a mode."""
    return "\n\n".join(
        "\n".join([*heading, aligned(filled(COLUMNS[table], group), group), *notes(group)])
        for heading, group in _by_mode(rows)
    )


def markdown(table: str, rows: Sequence[Record]) -> str:
    """The same as Markdown: a table a model and batch, under a line of what its rows agree in."""
    parts = []
    for heading, group in _by_mode(rows):
        setting, shown = COLUMNS[table][:_SETTING], filled(COLUMNS[table][_SETTING:], group)
        settings: dict[tuple[str, ...], list[Record]] = {}
        for row in group:
            settings.setdefault(tuple(column.cell(row) for column in setting), []).append(row)
        parts += heading
        for own in settings.values():
            parts += [_title(setting, own), piped(shown, own)]
    return "\n\n".join(parts)


def _title(setting: Sequence[Column], rows: Sequence[Record]) -> str:
    """The model, the sizes of its batch, and how it was measured."""
    model, *sizes = setting
    batch = "; ".join(f"{size.title}: {size.cell(rows[0])}" for size in sizes)
    how = dict.fromkeys(row["how"] for row in rows if "how" in row)
    return f"**{model.cell(rows[0])}** ({batch})" + "".join(f", {each}" for each in how)


def _by_mode(rows: Sequence[Record]) -> list[tuple[list[str], list[Record]]]:
    """A heading, or none, and its rows: what was compiled stands apart."""
    eager = [row for row in rows if not row.get("compiled")]
    compiled = [row for row in rows if row.get("compiled")]
    modes = ([], eager), (["Every arm under `torch.compile`:"], compiled)
    return [(heading, group) for heading, group in modes if group]


def filled(columns: Sequence[Column], rows: Sequence[Record]) -> list[Column]:
    """The columns of which any row has a cell."""
    return [column for column in columns if any(map(column.cell, rows))]


def aligned(columns: Sequence[Column], rows: Sequence[Record]) -> str:
    """Columns of equal width under their titles."""
    lines = [[column.title for column in columns], *_cells(columns, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join(
            cell.ljust(width) if column.words else cell.rjust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:]])


def piped(columns: Sequence[Column], rows: Sequence[Record]) -> str:
    """A Markdown table."""
    lines = [[column.title for column in columns]]
    lines.append(["---" if column.words else "---:" for column in columns])
    lines += _cells(columns, rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(columns: Sequence[Column], rows: Sequence[Record]) -> list[list[str]]:
    return [[column.cell(row) for column in columns] for row in rows]


def notes(rows: Sequence[Record]) -> list[str]:
    """How models were measured, `models: how`, a line for each way."""
    ways: dict[str, dict[str, None]] = {}
    for row in rows:
        if "how" in row:
            ways.setdefault(row["how"], {})[row["model"]] = None
    return [f"{', '.join(models)}: {how}" for how, models in ways.items()]
