"""The tables of docs/importance.md, from what `python -m bench.importance` wrote."""

import numpy

from artemis.benchmark.records import Record
from artemis.importance import METHODS

from .importance import BY_KIND, RATES, agreement


def last_runs(records: list[Record]) -> list[Record]:
    """The cases of the last run of each architecture."""
    cases = [record for record in records if record.get("kind") == "importance"]
    last = {record["architecture"]: record["run"] for record in cases}
    return [record for record in cases if record["run"] == last[record["architecture"]]]


def summary(records: list[Record]) -> str:
    """Mean and worst case of each method against both oracles, and what follows the data."""
    cases = last_runs(records)
    if not cases:
        return ""
    names = list(dict.fromkeys(case["architecture"] for case in cases))
    lines = [
        f"| trained alone | method | all | worst case | {' | '.join(names)} | differences |",
        "| --- | --- | ---: | ---: |" + " ---: |" * (len(names) + 1),
    ]
    for part in RATES:
        for method in (*METHODS, BY_KIND):
            found = agreement(cases, part, method)
            values = numpy.array(found["cases"])
            means = [
                values[[case["architecture"] == name for case in cases]].mean() for name in names
            ]
            differences = numpy.mean(list(found["differences"].values()))
            cells = [values.mean(), values.min(), *means, differences]
            name = f"`{method}`" if method in METHODS else "fixed table by kind"
            lines.append(f"| {part} | {name} | " + " | ".join(f"{c:.2f}" for c in cells) + " |")
    run = next(r for r in records if r.get("run") == cases[-1]["run"] and "versions" in r)
    return (
        "\n".join(lines)
        + f"\n\n{len(cases)} cases, torch {run['versions']['torch']}, {run['time'][:10]}.\n"
    )


def all_cases(records: list[Record]) -> str:
    """Every case: the modules that were changed, and each method's correlation with each oracle."""
    cases = last_runs(records)
    if not cases:
        return ""
    columns = [(part, method) for part in RATES for method in (*METHODS, BY_KIND)]
    found = {column: agreement(cases, *column)["cases"] for column in columns}
    head = " | ".join(f"{part}: {method}" for part, method in columns)
    lines = [f"| case | changed | {head} |", "| --- | --- |" + " ---: |" * len(columns)]
    for i, case in enumerate(cases):
        changed = ", ".join(_short(path) for path in case["planted"])
        cells = " | ".join(f"{found[column][i]:.2f}" for column in columns)
        lines.append(f"| {case['architecture']} {case['seed']} | {changed} | {cells} |")
    return "\n".join(lines) + "\n"


def _short(path: str) -> str:
    """Layer and module: `1 k_proj`."""
    parts = path.split(".")
    at = next(i for i, part in enumerate(parts) if part.isdecimal())
    return f"{parts[at]} {'.'.join(parts[at + 1 :]).removeprefix('attention.')}"
