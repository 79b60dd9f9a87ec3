"""The tables of what `artemis bench TABLE` wrote, a table a machine.

A row's ratios are to other rows of its own run. So the rows of one setting (a model on a batch, or
an operation on a layer) are those of the last run that has it, and of no other.
"""

from collections.abc import Callable, Sequence

from artemis.benchmark.arms import ARMS
from artemis.benchmark.machine import KEEPS, Identity, identity
from artemis.benchmark.models import MODELS
from artemis.benchmark.records import Record
from artemis.benchmark.tables import markdown

from .origins import origins, origins_listed

#: What rows of one setting agree in.
_SETTING = (
    "model", "tokens", "sequence", "batch", "compiled",
    "op", "layer", "m", "k", "n", "r", "dropout", "pass", "dtype",
)  # fmt: skip


def bench_table(
    table: str,
    records: list[Record],
    render: Callable[[list[Record]], str] | None = None,
    short: bool = False,
) -> str:
    """What `artemis bench` wrote last of each setting, by `render` if it is not as it prints it.

    What was measured with an allocator that keeps memory is not shown without it once more;
    `short`: of the machine that trained last, and of others what that one lacks; a machine's runs
    in one line.
    """
    heads = _heads(records)
    machines: dict[Identity, list[Record]] = {}
    for row in (_rows_in_short if short else last_rows)(table, records):
        machines.setdefault(identity(heads[row["run"]]), []).append(row)

    def newest(own: Identity) -> str:
        return max(heads[row["run"]]["time"] for row in machines[own])

    parts = []
    in_turn = sorted(sorted(machines, key=newest, reverse=True), key=_takes_memory_as_it_comes)
    for own in in_turn:
        order = in_order(machines[own])
        runs = [heads[run] for run in dict.fromkeys(row["run"] for row in order)]
        made = render(order) if render else markdown(table, order)
        where = origins(runs) if short else origins_listed(runs)
        of = f"On {own.processor}, allocator {own.allocator}:\n\n" if len(machines) > 1 else ""
        parts.append(f"{of}{made}\n\n{where}\n")
    return "\n".join(parts)


def _takes_memory_as_it_comes(machine: Identity) -> bool:
    return machine.allocator != KEEPS


def last_rows(table: str, records: list[Record]) -> list[Record]:
    """The rows that the table shows, of all machines."""
    heads = _heads(records)
    rows = [r for r in records if r.get("kind") == "row" and r.get("table") == table]
    return _of_last_runs(_with_best_allocator(rows, heads), heads)


def rows_here(table: str, records: list[Record]) -> list[Record]:
    """Of them, those of the machine that trained last: what the README is about."""
    heads = _heads(records)
    trained = last_rows("train", records)
    last = max(trained, key=lambda row: heads[row["run"]]["time"], default=None)
    here = last and _chips(last, heads)
    return [row for row in last_rows(table, records) if _chips(row, heads) == here]


def _rows_in_short(table: str, records: list[Record]) -> list[Record]:
    def case(row: Record) -> tuple:
        return row.get("model"), row.get("tokens"), row.get("compiled")

    here = rows_here(table, records)
    known = set(map(case, here))
    return here + [row for row in last_rows(table, records) if case(row) not in known]


def _heads(records: list[Record]) -> dict[str, Record]:
    return {record["run"]: record for record in records if record.get("kind") == "run"}


def _of_last_runs(rows: list[Record], heads: dict[str, Record]) -> list[Record]:
    """Of every machine and setting, and in that run, what it wrote last."""

    def setting(row: Record) -> tuple:
        return identity(heads[row["run"]]), *map(row.get, _SETTING)

    last = {setting(row): row["run"] for row in rows}
    kept = {
        (setting(row), row.get("arm"), row.get("provider")): row
        for row in rows
        if row["run"] == last[setting(row)]
    }
    return list(kept.values())


def _with_best_allocator(rows: list[Record], heads: dict[str, Record]) -> list[Record]:
    """Without what another run measured on the same chips with freed memory kept."""

    def about(row: Record) -> tuple:
        return *_chips(row, heads), *map(row.get, _SETTING)

    def keeps(row: Record) -> bool:
        return identity(heads[row["run"]]).allocator == KEEPS

    better = {about(row) for row in rows if keeps(row)}
    return [row for row in rows if keeps(row) or about(row) not in better]


def _chips(row: Record, heads: dict[str, Record]) -> tuple:
    where = identity(heads[row["run"]])
    return where.processor, where.threads, where.gpu


def in_order(rows: Sequence[Record]) -> list[Record]:
    """Models and arms in their own order, all rows of one model and mode together."""
    models = [*MODELS, *dict.fromkeys(each.get("model") for each in rows)]
    arms = [*ARMS, *dict.fromkeys(each.get("arm") for each in rows)]

    def place(row: Record) -> tuple[int, ...]:
        mode = bool(row.get("compiled"))
        return (
            models.index(row.get("model")),
            row.get("tokens", 0),
            mode,
            arms.index(row.get("arm")),
        )

    return sorted(rows, key=place)
