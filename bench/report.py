"""Write the measured tables of the documents from `bench/results/*.jsonl`.

    python -m bench.report            # fill every `<!-- begin: NAME -->` ... `<!-- end: NAME -->`
    python -m bench.report --check    # change nothing; exit status 1 where a document is behind

NAME is a key of `SECTIONS`; `bench-TABLE` shows what `artemis bench TABLE --json` wrote (in short:
`bench-models`, `bench-baselines` and `promises`), `predicted-...` what is reckoned, not measured.
Of several runs of one size and precision, or one setting of `artemis bench`, on one machine, the
last counts.
"""

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial

from artemis.benchmark.records import Record, read
from artemis.benchmark.tables import COLUMNS
from artemis.cli.demo.report import render

from . import (
    ROOT,
    adapters_tables,
    equal_loss_tables,
    gpu_tables,
    head_tables,
    importance_tables,
    kernel_tables,
    model_tables,
    predictions,
    promises,
    quality_tables,
    quantized_tables,
    step_tables,
    tuned,
)
from .command_tables import bench_table

RESULTS = ROOT / "bench" / "results"
_SECTION = re.compile(r"<!-- begin: ([\w-]+) -->\n.*?<!-- end: \1 -->", re.DOTALL)
_NOTHING = "*Not measured yet.*\n"


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


def demo(records: list[Record]) -> str:
    """What `artemis demo --json` wrote last, as the demo prints it."""
    runs = [record for record in records if "share_of_improvement" in record]
    if not runs:
        return ""
    setting = runs[-1]["setting"]
    where = f"{setting['device']}, matrix products in {setting['precision']}"
    return f"```\n{render(runs[-1]['arms'])}\n```\n\n{where}, torch {setting['torch']}.\n"


SECTIONS: dict[str, Callable[[list[Record]], str]] = {
    "attention": step_tables.attention,
    "attention-prompt": step_tables.attention_of_a_prompt,
    "attention-token": step_tables.attention_of_a_token,
    "training-step": step_tables.training_step,
    "training-step-ratios": step_tables.training_step_ratios,
    "training-step-profile": step_tables.training_step_profile,
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
    **gpu_tables.SECTIONS,
    "promises": promises.table,
    "bench-models": partial(bench_table, "train", render=model_tables.models, short=True),
    "bench-baselines": partial(bench_table, "train", render=model_tables.baselines, short=True),
}


if __name__ == "__main__":
    sys.exit(main())
