"""A training step of one small Llama by every method, side by side in one process.

    python -m bench.train_step                              # hidden 512, 8 layers, 1,024 tokens
    python -m bench.train_step --arms 'bf16/*' --preset 2048x2 --rounds 8 --out steps.jsonl

Peaks are measured first; adapter arms pass the accuracy gate before they are timed; then all arms
take turns. Prints times and the ratios that the targets are about, and appends them to a file of
JSON lines. Exit status 1 where an arm fails the gate.
"""

import argparse
import sys
import uuid
from pathlib import Path
from typing import Any

from artemis.benchmark import machine
from artemis.benchmark.arms import TrainingStep
from artemis.benchmark.peaks import peaks
from artemis.benchmark.records import append
from artemis.benchmark.turns import Provider, Spread, interleaved

from . import accuracy
from .cases import Case
from .options import add_case_options, chosen_arms, chosen_case
from .providers import Arm
from .targets import RATIOS


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    case: Case = options.case
    record: dict[str, Any] = {
        "kind": "run",
        **machine.facts(),
        "case": {"name": case.name, "tokens": case.tokens, **case.to_dict()},
        "rounds": options.rounds,
        "peaks": peaks(),
    }
    print(_headline(record))
    providers, rows, failed = _prepare(options.arms, case)
    times = interleaved(providers, options.rounds)
    for row in rows:
        if row["arm"] in times:
            row["ms"] = Spread.of(times[row["arm"]]).to_dict(2)
    ratios = [
        ratio.record(spread) for ratio in RATIOS if (spread := ratio.measured(times)) is not None
    ]
    print_table(rows, ratios)
    if options.out is not None:
        run = uuid.uuid4().hex[:12]
        append(options.out, [{"run": run, **line} for line in (record, *rows, *ratios)])
    return 1 if failed else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_case_options(parser, default_arms=["*"])
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds, two more warm up")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append JSON lines to FILE")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds: got {options.rounds}, allowed: an integer from 2")
    options.case, options.arms = chosen_case(parser, options), chosen_arms(parser, options)
    return options


def _prepare(
    arms: list[Arm], case: Case
) -> tuple[dict[str, Provider], list[dict[str, Any]], list[str]]:
    """Build the arms and check them; return what to time, a row for each arm, and who failed."""
    providers, rows, failed = {}, [], []
    for arm in arms:
        provider = arm.make(case)
        row: dict[str, Any] = {"kind": "arm", "arm": arm.path, "what": arm.what}
        rows.append(row)
        if isinstance(provider, TrainingStep):
            row["trained_parameters"] = provider.trained_parameters
            if accuracy.adapter_parameters(provider.model):
                verdict = accuracy.check(provider, arm, case)
                row["error"] = verdict.to_dict()
                if not verdict.passed:
                    print(
                        f"not timed: {arm.path} fails the accuracy rule: {verdict}", file=sys.stderr
                    )
                    failed.append(arm.path)
                    continue
        providers[arm.path] = provider
    return providers, rows, failed


def _headline(record: dict[str, Any]) -> str:
    case, peak = record["case"], record["peaks"]
    return (
        f"{record['processor']['name']}, {record['threads']} threads, torch"
        f" {record['versions']['torch']}: fp32 {peak['gemm_fp32_gflops']:.0f} and bf16"
        f" {peak['gemm_bf16_gflops']:.0f} GFLOP/s, copy {peak['copy_gbs']:.1f} GB/s\n"
        f"Llama of hidden {case['hidden']}, {case['layers']} layers, {case['tokens']} tokens a"
        f" step in sequences of {case['sequence']}; fused AdamW\n"
    )


def print_table(rows: list[dict[str, Any]], ratios: list[dict[str, Any]]) -> None:
    """Times, then ratios with their targets."""
    print(f"{'arm':22}{'ms':>9}{'p20':>9}{'p80':>9}{'trained':>12}{'error':>7}")
    for row in rows:
        if "ms" not in row:
            continue
        ms, error = row["ms"], row.get("error", {}).get("ratio", "")
        print(
            f"{row['arm']:22}{ms['p50']:9.1f}{ms['p20']:9.1f}{ms['p80']:9.1f}"
            f"{row.get('trained_parameters', ''):>12}{error:>7}"
        )
    print(f"\n{'ratio':58}{'median':>8}{'p20':>7}{'p80':>7}{'target':>9}")
    for ratio in ratios:
        verdict = {True: "met", False: "MISSED", None: ""}[ratio["met"]]
        print(
            f"{ratio['name']:58}{ratio['p50']:8.3f}{ratio['p20']:7.2f}{ratio['p80']:7.2f}"
            f"{ratio['target']:>9} {verdict}"
        )


if __name__ == "__main__":
    sys.exit(main())
