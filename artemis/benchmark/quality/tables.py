"""The tables of a study, for a terminal or as Markdown."""

from collections.abc import Callable, Sequence

from ..records import Record
from ..tables import GIGA, Column, aligned, piped
from .results import Dataset


def _interval(key: str, points: bool = False) -> Callable[[Record], str]:
    """A share as per cent with the ends of its interval, or a difference in percentage points."""
    form = "{:+.1f}" if points else "{:.1f}"

    def cell(row: Record) -> str:
        found = row[key]
        if found is None:
            return ""
        value, low, high = (None if v is None else form.format(100 * v) for v in found.values())
        return value if low is None else f"{value} ({low} to {high})"

    return cell


def _setting(row: Record) -> str:
    return f"{row['choice']:.0e}{'*' if row['at_the_edge'] else ''}"


def _peak(row: Record) -> str:
    return "" if row["peak_memory"] is None else f"{row['peak_memory'] / GIGA:.2f}"


_SEEDS = Column("seeds", lambda row: str(row["seeds"]))
ARM_COLUMNS = (
    Column("data", lambda row: row["dataset"], words=True),
    Column("arm", lambda row: row["what"], words=True),
    _SEEDS,
    Column("accuracy, %", _interval("accuracy")),
    Column("of full's, %", _interval("retention")),
    Column("gap closed, %", _interval("gap")),
    Column("trained parameters", lambda row: f"{row['trained_parameters']:,}"),
    Column("peak, GB", _peak),
    Column("seconds", lambda row: f"{row['seconds']:.0f}"),
    Column("rate", _setting),
)
COMPARISON_COLUMNS = (
    Column("data", lambda row: row["dataset"], words=True),
    Column("comparison", lambda row: row["what"], words=True),
    _SEEDS,
    Column("difference, points", _interval("difference", points=True)),
    Column("", lambda row: row["verdict"], words=True),
)
TARGET_COLUMNS = (
    Column("data", lambda row: row["dataset"], words=True),
    Column("default hybrid's", lambda row: row["what"], words=True),
    _SEEDS,
    Column("measured, %", _interval("measured")),
    Column("target, %", lambda row: f"≥ {100 * row['target']:g}"),
    Column("", lambda row: row["verdict"], words=True),
)


def parts(found: Sequence[Dataset]) -> list[tuple[tuple[Column, ...], list[Record]]]:
    """Columns and rows of the tables that have any."""
    tables = (
        (ARM_COLUMNS, [row for each in found for row in each.rows()]),
        (COMPARISON_COLUMNS, [row for each in found for row in each.comparisons()]),
        (TARGET_COLUMNS, [row for each in found for row in each.targets()]),
    )
    return [(columns, rows) for columns, rows in tables if rows]


def text(found: Sequence[Dataset]) -> str:
    return "\n\n".join(aligned(columns, rows) for columns, rows in parts(found))


def markdown(found: Sequence[Dataset]) -> str:
    return "\n\n".join(piped(columns, rows) for columns, rows in parts(found))
