"""Write the measured tables of the documents from `bench/results/*.jsonl`.

    python -m bench.report            # fill every `<!-- begin: NAME -->` ... `<!-- end: NAME -->`
    python -m bench.report --check    # change nothing; exit status 1 where a document is behind

NAME is `training-step`, `attention`, `training-step-ratios`, `training-step-profile`, `importance`,
`importance-cases`, `quality`, `quality-trials`, `quantized-quality`, `quantized-rounding`,
`quantized-sizes`, `predicted-packed`, `predicted-kernels`, `predicted-training` or
`predicted-decode` (these four are reckoned, not measured), `adapters-PART` of its study,
`head-adaptation`, `equal-loss`, `tuned` or `demo`, or `bench-TABLE` for what
`artemis bench TABLE --json` wrote (`bench-models`: training, in short;
`promises`: what of it was promised). Of several runs of one size
and precision, or one setting of `artemis bench`, on one machine, the last counts.
"""

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from artemis.benchmark.runner import read
from artemis.benchmark.tables import COLUMNS
from artemis.cli.demo.report import render

from . import (
    ROOT,
    adapters_tables,
    equal_loss_tables,
    head_tables,
    importance_tables,
    kernel_tables,
    model_tables,
    predictions,
    promises,
    quality_tables,
    quantized_tables,
    tuned,
)
from .command_tables import bench_table
from .origins import origin
from .profile_step import GROUPS

RESULTS = ROOT / "bench" / "results"
Record = dict[str, Any]
_SECTION = re.compile(r"<!-- begin: ([\w-]+) -->\n.*?<!-- end: \1 -->", re.DOTALL)
_NOTHING = "*Not measured yet.*\n"
_STEP_HEADER = [
    "| arm | ms a step | p20–p80 | tokens/s | trained parameters |",
    "| --- | ---: | ---: | ---: | ---: |",
]
_RATIO_HEADER = [
    "| hidden × layers | ratio | measured | p20–p80 | target | |",
    "| --- | --- | ---: | ---: | ---: | --- |",
]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="only say which documents are behind")
    check = parser.parse_args(arguments).check
    records = [record for path in sorted(RESULTS.glob("*.jsonl")) for record in read(path)]
    behind = []
    for path in sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))):
        old = path.read_text(encoding="utf-8")
        new = filled(old, records)
        if new != old:
            behind.append(path)
            if not check:
                path.write_text(new, encoding="utf-8")
    for path in behind:
        print(f"{path.relative_to(ROOT)}: {'behind its results' if check else 'written'}")
    return 1 if check and behind else 0


def filled(document: str, records: list[Record]) -> str:
    """The document with its marked sections made anew; raises KeyError for an unknown name."""

    def section(match: re.Match) -> str:
        name = match[1]
        body = SECTIONS[name](records) or _NOTHING
        return f"<!-- begin: {name} -->\n{body}<!-- end: {name} -->"

    return _SECTION.sub(section, document)


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


def training_step(records: list[Record]) -> str:
    """Times of all arms, a table a run."""
    tables = []
    for run in measured(records):
        rows = [_step_row(arm, run.head["case"]["tokens"]) for arm in run.arms if "ms" in arm]
        table = "\n".join(_STEP_HEADER + rows)
        tables.append(f"### {run.title}\n\n{table}\n\n{origin(run.head)}\n")
    return "\n".join(tables)


def _step_row(arm: Record, tokens: int) -> str:
    ms = arm["ms"]
    cells = [arm["what"], f"{ms['p50']:,.0f}", f"{ms['p20']:,.0f}–{ms['p80']:,.0f}", "", ""]
    if "trained_parameters" in arm:  # else it is no whole step
        cells[3:] = f"{tokens / ms['p50'] * 1e3:,.0f}", f"{arm['trained_parameters']:,}"
    return f"| {' | '.join(cells)} |"


def attention(records: list[Record]) -> str:
    """Either attention at each length; the last measurement of each counts."""
    last = {(r["precision"], r["sequence"]): r for r in records if r.get("kind") == "attention"}
    if not last:
        return ""
    rows = [
        f"| {precision} | {length:,} | {ms['sdpa']['p50']:,.0f} | {ms['eager']['p50']:,.0f} |"
        for (precision, length), ms in ((key, record["ms"]) for key, record in last.items())
    ]
    header = [
        "| precision | tokens a sequence | fused, ms | plain, ms |",
        "| --- | ---: | ---: | ---: |",
    ]
    return "\n".join([*header, *rows, "", origin(next(iter(last.values()))), ""])


def training_step_ratios(records: list[Record]) -> str:
    """The ratios, all runs in one table."""
    rows = [
        f"| {run.head['case']['hidden']:,} × {run.head['case']['layers']} | {ratio['name']} |"
        f" {ratio['p50']:.3f} | {ratio['p20']:.2f}–{ratio['p80']:.2f} | {ratio['target']} |"
        f" {({True: 'met', False: 'missed', None: ''})[ratio['met']]} |"
        for run in measured(records)
        for ratio in run.ratios
    ]
    return "\n".join(_RATIO_HEADER + rows) + "\n" if rows else ""


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


def demo(records: list[Record]) -> str:
    """What `artemis demo --json` wrote last, as the demo prints it."""
    runs = [record for record in records if "share_of_improvement" in record]
    if not runs:
        return ""
    setting = runs[-1]["setting"]
    where = f"{setting['device']}, matrix products in {setting['precision']}"
    return f"```\n{render(runs[-1]['arms'])}\n```\n\n{where}, torch {setting['torch']}.\n"


SECTIONS: dict[str, Callable[[list[Record]], str]] = {
    "attention": attention,
    "training-step": training_step,
    "training-step-ratios": training_step_ratios,
    "training-step-profile": training_step_profile,
    "demo": demo,
    "equal-loss": equal_loss_tables.table,
    "head-adaptation": head_tables.table,
    "tuned": tuned.table,
    "importance": importance_tables.summary,
    "importance-cases": importance_tables.all_cases,
    "quality": quality_tables.summary,
    "quality-trials": quality_tables.trials,
    "quantized-quality": quantized_tables.quality,
    "quantized-rounding": quantized_tables.rounding,
    "quantized-sizes": quantized_tables.sizes,
    "predicted-kernels": predictions.kernels,
    "predicted-training": predictions.training,
    "predicted-decode": predictions.decoding,
    "predicted-packed": predictions.packed,
    **{
        f"adapters-{part}": partial(adapters_tables.table, part=part)
        for part in ("orthogonality", "init", "sharing", "allocation")
    },
    **{f"bench-{table}": partial(bench_table, table) for table in COLUMNS},
    "bench-kernels": partial(bench_table, "kernels", render=kernel_tables.table),
    "promises": promises.table,
    "bench-models": partial(bench_table, "train", render=model_tables.table, short=True),
}


if __name__ == "__main__":
    sys.exit(main())
