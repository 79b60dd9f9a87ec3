"""Tables of docs/benchmarks.md, from what `train_step`, `profile_step` and `attention` wrote."""

import re
from typing import Any

from .origins import origin
from .profile_step import GROUPS

Record = dict[str, Any]
_STEP_HEADER = [
    "| arm | ms a step | p20–p80 | tokens/s | trained parameters |",
    "| --- | ---: | ---: | ---: | ---: |",
]
_RATIO_HEADER = [
    "| hidden × layers | ratio | measured | p20–p80 | target | |",
    "| --- | --- | ---: | ---: | ---: | --- |",
]


class Measured:
    """One precision of one run: its head, arms and ratios."""

    def __init__(self, head: Record, precision: str):
        self.head, self.precision = head, precision
        self.arms: list[Record] = []
        self.ratios: list[Record] = []

    @property
    def what(self) -> tuple[str, ...]:
        """Equal for runs of which only the last counts."""
        case = self.head["case"]
        return self.head["processor"]["name"], str(self.head["threads"]), str(case), self.precision

    @property
    def title(self) -> str:
        return f"{case_title(self.head['case'])}, {self.precision}"


def case_title(case: Record) -> str:
    """The case in words."""
    layers = "1 layer" if case["layers"] == 1 else f"{case['layers']} layers"
    count = case["batch"] * case["sequence"]
    return f"hidden {case['hidden']:,}, {layers}, {count:,} tokens a step"


def measured(records: list[Record]) -> list[Measured]:
    """The last run of every machine, size and precision, smallest size first."""
    runs: dict[tuple[str, str], Measured] = {}
    heads = {record["run"]: record for record in records if record.get("kind") == "run"}
    for record in records:
        if record.get("kind") not in ("arm", "ratio"):
            continue
        name = record["arm" if record["kind"] == "arm" else "name"]
        precision = re.split("[/:]", name)[0]
        run = runs.setdefault((record["run"], precision), Measured(heads[record["run"]], precision))
        (run.arms if record["kind"] == "arm" else run.ratios).append(record)
    last = {run.what: run for run in runs.values()}
    return sorted(last.values(), key=lambda run: (run.head["case"]["hidden"], run.title))


def by_machine(records: list[Record]) -> dict[str, list[Measured]]:
    """`measured` of each processor, that of the last run first."""
    runs = measured(records)
    newest_first = sorted(runs, key=lambda run: records.index(run.head), reverse=True)
    names = dict.fromkeys(run.head["processor"]["name"] for run in newest_first)
    return {name: [r for r in runs if r.head["processor"]["name"] == name] for name in names}


def training_step(records: list[Record]) -> str:
    """Times of all arms, a table a run."""
    tables, machines = [], by_machine(records)
    for name, runs in machines.items():
        where = f", {name}" if len(machines) > 1 else ""
        for run in runs:
            rows = [_step_row(arm, run.head["case"]["tokens"]) for arm in run.arms if "ms" in arm]
            table = "\n".join(_STEP_HEADER + rows)
            tables.append(f"### {run.title}{where}\n\n{table}\n\n{origin(run.head)}\n")
    return "\n".join(tables)


def _step_row(arm: Record, tokens: int) -> str:
    ms = arm["ms"]
    cells = [arm["what"], f"{ms['p50']:,.0f}", f"{ms['p20']:,.0f}–{ms['p80']:,.0f}", "", ""]
    if "trained_parameters" in arm:  # else it is no whole step
        cells[3:] = f"{tokens / ms['p50'] * 1e3:,.0f}", f"{arm['trained_parameters']:,}"
    return f"| {' | '.join(cells)} |"


def attention(records: list[Record]) -> str:
    """Each attention in training, by length."""
    return _attentions(records, "attention", ("precision", "tokens a sequence"), ",.0f")


def attention_of_a_prompt(records: list[Record]) -> str:
    """Each attention where a prompt is read."""
    return _attentions(records, "attention-prompt", ("precision", "tokens"), ",.1f")


def attention_of_a_token(records: list[Record]) -> str:
    """Each attention for one token."""
    about = ("precision", "heads", "of keys and values", "tokens before")
    return _attentions(records, "attention-token", about, ".2f")


_FIELDS = {
    "precision": "precision", "heads": "heads", "of keys and values": "key_value_heads",
    "tokens a sequence": "sequence", "tokens": "sequence", "tokens before": "sequence",
}  # fmt: skip
_ATTENTIONS = {"sdpa": "torch's fused, ms", "eager": "plain, ms", "artemis": "ours, ms"}


def _attentions(records: list[Record], kind: str, about: tuple[str, ...], form: str) -> str:
    """A case a row, a column each; the last measurement of each case counts."""
    last = {
        tuple(record[_FIELDS[title]] for title in about): record
        for record in records
        if record.get("kind") == kind
    }
    if not last:
        return ""
    rows = []
    for case, record in sorted(last.items()):
        times = (record["ms"].get(name) for name in _ATTENTIONS)
        cells = [f"{each:,}" if isinstance(each, int) else each for each in case]
        cells += ["" if ms is None else f"{ms['p50']:{form}}" for ms in times]
        rows.append(f"| {' | '.join(cells)} |")
    titles = (*about, *_ATTENTIONS.values())
    rule = "| --- |" + " ---: |" * (len(titles) - 1)
    header = [f"| {' | '.join(titles)} |", rule]
    return "\n".join([*header, *rows, "", origin(next(iter(last.values()))), ""])


def training_step_ratios(records: list[Record]) -> str:
    """The ratios, all runs of a machine in one table."""
    tables, machines = [], by_machine(records)
    for name, runs in machines.items():
        rows = [_ratio_row(run, ratio) for run in runs for ratio in run.ratios]
        where = f"On {name}:\n\n" if len(machines) > 1 else ""
        tables.append(where + "\n".join(_RATIO_HEADER + rows) + "\n")
    return "\n".join(tables)


def _ratio_row(run: Measured, ratio: Record) -> str:
    case = run.head["case"]
    verdict = {True: "met", False: "missed", None: ""}[ratio["met"]]
    return (
        f"| {case['hidden']:,} × {case['layers']} | {ratio['name']} | {ratio['p50']:.3f} |"
        f" {ratio['p20']:.2f}–{ratio['p80']:.2f} | {ratio['target']} | {verdict} |"
    )


def training_step_profile(records: list[Record]) -> str:
    """Where the milliseconds of a step go, a table a size and precision."""
    last: dict[tuple[str, ...], Record] = {}
    for record in records:
        if record.get("kind") == "profile":
            arms = tuple(record["arms"])
            last[record["processor"]["name"], str(record["case"]), *arms] = record
    tables = []
    for record in last.values():
        arms = record["arms"]
        rows = [f"| ms a step | {' | '.join(arms)} |", "| --- |" + " ---: |" * len(arms)]
        rows += [
            f"| {group} | {' | '.join(f'{column[group]:.0f}' for column in arms.values())} |"
            for group in GROUPS
        ]
        title = f"### Profile: {case_title(record['case'])}"
        tables.append(f"{title}\n\n" + "\n".join(rows) + f"\n\n{origin(record)}\n")
    return "\n".join(tables)
