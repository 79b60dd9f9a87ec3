"""What `artemis tune` found: its tables as results, and the table of docs/tuning.md.

    artemis tune ... --table FOLDER
    python -m bench.tuned FOLDER/NAME.json    # append it to bench/results/cpu_tune.jsonl

Run both on the machine, and from the commit, that the entries are of. Of several entries of one
case on one machine, the last counts.
"""

import argparse
import json
from pathlib import Path

from artemis.benchmark.machine import facts, identity
from artemis.benchmark.records import Record, append

from . import ROOT

RUN, ROW = "tune", "tuned"
_HEADER = (
    "| call | rows | built-in choice | ms (p20–p80) | fastest other | ms (p20–p80) | speed | |\n"
    "| --- | ---: | --- | ---: | --- | ---: | ---: | --- |\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tuned", description=__doc__)
    parser.add_argument("table", type=Path, help="a table that artemis tune wrote")
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/cpu_tune.jsonl")
    arguments = parser.parse_args()
    found = json.loads(arguments.table.read_text(encoding="utf-8"))
    head = {"kind": RUN, "table": arguments.table.stem, **facts()}
    head["run"] = f"{head['table']} {head['time']}"
    rows = [
        {"kind": ROW, "run": head["run"], "part": part, "key": key, **entry}
        for part, entries in found.items()
        for key, entry in entries.items()
    ]
    append(arguments.json, [head, *rows])


def table(records: list[Record]) -> str:
    """The built-in choice of every case beside the fastest of the others, a table a machine."""
    heads = {record["run"]: record for record in records if record.get("kind") == RUN}
    machines: dict[tuple, dict[str, Record]] = {}
    for record in records:
        if record.get("kind") == ROW and record["part"] == "strategies":
            machines.setdefault(identity(heads[record["run"]]), {})[record["key"]] = record
    parts = []
    for rows in machines.values():
        lines = [_line(key, rows[key]) for key in sorted(rows, key=_order)]
        head = heads[next(reversed(rows.values()))["run"]]
        commit = (head["commit"] or "unknown")[:12] + " with changes" * bool(head["dirty"])
        where = f"{head['table']}, torch {head['versions']['torch']}; commit `{commit}`"
        parts.append(_HEADER + "\n".join(lines) + f"\n\n{where}, {head['time'][:10]}.\n")
    return "\n".join(parts)


def _order(key: str) -> tuple:
    op, rows, *rest = key.split(" ")
    return op, rest, int(rows)


def _line(key: str, row: Record) -> str:
    op, rows, k, n, width, dtype, weight, *flags = key.split(" ")
    call = f"`{op}` {k}→{n}" + f", width {width}" * (width != "0")
    call += f", {dtype}, {weight}" + "".join(f", {flag}" for flag in flags)
    usual, kept = row["usual"], row["chosen"] != row["usual"]
    others = {name: ms for name, ms in row["ms"].items() if name != usual}
    other = row["chosen"] if kept else min(others, key=lambda name: others[name][1])
    speed = f"{row['ms'][usual][1] / others[other][1]:.2f}"
    cells = [usual, _spread(row["ms"][usual]), other, _spread(others[other]), speed, "kept" * kept]
    return f"| {call} | {int(rows):,} | {' | '.join(cells)} |"


def _spread(ms: list[float]) -> str:
    fast, median, slow = ms
    return f"{median:.3g} ({fast:.3g}–{slow:.3g})"


if __name__ == "__main__":
    main()
