"""The tables of docs/adapters.md, from what `python -m bench.adapters_study` wrote."""

import statistics

from artemis.benchmark.records import Record

from .adapters_study import ARMS, TRIAL_SEED, TRIALS

#: Student's t for a 95 % interval, by seeds less one.
_STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}


def cells(records: list[Record]) -> dict[str, list[Record]]:
    """Arm -> its judged runs, at the rate that its trials chose, in order of seeds."""
    found: dict[str, list[Record]] = {}
    own = [record for record in records if record.get("kind") == "adapters"]
    for arm in ARMS:
        every = [r for r in own if r["arm"] == arm and r["rate"] in TRIALS]
        trials = [r for r in every if r["seed"] == TRIAL_SEED]
        if len(trials) < len(TRIALS):
            continue
        rate = min(trials, key=lambda r: r["loss"])["rate"]
        runs = {r["seed"]: r for r in every if r["rate"] == rate and r["seed"] != TRIAL_SEED}
        if runs:
            found[arm] = [runs[seed] for seed in sorted(runs)]
    return found


def table(records: list[Record], part: str) -> str:
    """The default and the arms of `part`; differences from the default are paired by seed."""
    known = cells(records)
    if "default" not in known:
        return ""
    lines = [
        "| arm | seeds | held-out loss | against the default | rate | condition of A | of B"
        " | stored |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arm, runs in known.items():
        if arm == "default" or ARMS[arm].part == part:
            lines.append(_row(arm, runs, known["default"]))
    first = known["default"][0]
    head = next(r for r in records if r.get("run") == first["run"] and "versions" in r)
    note = (
        f"Before training {first['before']:.3f}. {head['threads']} thread,"
        f" torch {head['versions']['torch']}, {head['time'][:10]}."
        " \\* at an end of the rates that were tried."
    )
    return "\n".join([*lines, "", note, ""])


def _row(arm: str, runs: list[Record], default: list[Record]) -> str:
    losses = [run["loss"] for run in runs]
    base = {run["seed"]: run["loss"] for run in default}
    differences = [run["loss"] - base[run["seed"]] for run in runs if run["seed"] in base]
    rate = runs[0]["rate"]
    columns = [
        arm,
        f"{len(runs)}",
        f"{statistics.mean(losses):.3f}",
        "" if arm == "default" else _interval(differences),
        f"{rate:.0e}" + "*" * (rate in (min(TRIALS), max(TRIALS))),
        *(_condition(runs, side) for side in ("condition_a", "condition_b")),
        f"{runs[0]['parameters']:,}",
    ]
    return f"| {' | '.join(columns)} |"


def _interval(values: list[float]) -> str:
    """Mean and Student's 95 % interval."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.3f}"
    half = _STUDENT.get(len(values) - 1, 2.0) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def _condition(runs: list[Record], side: str) -> str:
    values = [run[side] for run in runs if run[side] is not None]
    return f"{statistics.median(values):,.1f}" if values else "-"
