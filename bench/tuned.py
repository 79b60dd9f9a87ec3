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
    "| call | rows | strategy | ms | p20–p80 | against the built-in choice | |\n"
    "| --- | ---: | --- | ---: | ---: | ---: | --- |\n"
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
    """Every strategy that was timed, the fastest of a case first, a table a machine."""
    heads = {record["run"]: record for record in records if record.get("kind") == RUN}
    machines: dict[tuple, dict[str, Record]] = {}
    for record in records:
        if record.get("kind") == ROW and record["part"] == "strategies":
            machines.setdefault(identity(heads[record["run"]]), {})[record["key"]] = record
    parts = []
    for rows in machines.values():
        lines = [line for key in sorted(rows, key=_order) for line in _lines(key, rows[key])]
        head = heads[next(reversed(rows.values()))["run"]]
        commit = (head["commit"] or "unknown")[:12] + " with changes" * bool(head["dirty"])
        where = f"{head['table']}, torch {head['versions']['torch']}; commit `{commit}`"
        parts.append(_HEADER + "\n".join(lines) + f"\n\n{where}, {head['time'][:10]}.\n")
    return "\n".join(parts)


def _order(key: str) -> tuple:
    op, rows, *rest = key.split(" ")
    return op, rest, int(rows)


def _lines(key: str, row: Record) -> list[str]:
    op, rows, k, n, width, dtype, weight, *flags = key.split(" ")
    call = f"`{op}` {k}→{n}" + f", width {width}" * (width != "0")
    call += f", {dtype}, {weight}" + "".join(f", {flag}" for flag in flags)
    base = row["ms"][row["usual"]][1]
    lines = []
    for name, (fast, median, slow) in sorted(row["ms"].items(), key=lambda item: item[1][1]):
        chosen = row["chosen"] != row["usual"] and name == row["chosen"]
        mark = "kept" if chosen else "built-in choice" if name == row["usual"] else ""
        lines.append(
            f"| {call} | {int(rows):,} | {name} | {median:.3g} | {fast:.3g}–{slow:.3g}"
            f" | {base / median:.2f} | {mark} |"
        )
    return lines


if __name__ == "__main__":
    main()
