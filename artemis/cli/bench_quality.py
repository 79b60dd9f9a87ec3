"""`artemis bench quality`: how much of full fine-tuning's quality each kind of adapter keeps."""

import argparse
from pathlib import Path

from ..benchmark.quality.arms import ARMS, CORE
from ..errors import AdapterError
from ..schema import check_integer

NAME = "quality"
SUMMARY = "quality on labelled text: adapters, full fine-tuning and the frozen base, with intervals"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="folder of a pretrained encoder"
    )
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, metavar="FILE",
        help="NAME.train.jsonl and NAME.test.jsonl of each data set; a line is"
        ' {"text": ..., "label": ...}',
    )  # fmt: skip
    parser.add_argument(
        "--arms", nargs="+", metavar="NAME",
        help=f"of {', '.join(ARMS)} (default: {', '.join(CORE)}; with --full all)",
    )  # fmt: skip
    for name, default, what in (
        ("--seeds", 5, "runs of every arm"),
        ("--epochs", 1, "passes over the training examples"),
        ("--batch", 32, "examples a step"),
        ("--length", 64, "tokens at which a text is cut"),
    ):
        parser.add_argument(
            name, type=int, default=default, metavar="N", help=f"{what} (default: {default})"
        )
    parser.add_argument(
        "--examples", type=int, metavar="N",
        help="training examples of a run, drawn by its seed (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="of the products (default: auto, bf16 where it is faster)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm  # here: the other commands need none of it

    from ..benchmark import plots
    from ..benchmark.quality.results import datasets
    from ..benchmark.quality.tables import text

    study = _study(args)
    if args.plot is not None:
        plots.require_matplotlib()
    jobs = list(study.pending())
    for job in tqdm(jobs, "quality", unit="run", disable=None):
        study.measure(job)
    found = datasets(study.cells())
    print(text(found))
    if args.plot is not None:
        plots.accuracies(args.plot, [row for each in found for row in each.rows()])


def _study(args: argparse.Namespace):
    """Everything is read and checked here, before the first run."""
    from ..benchmark.quality.data import load_task, named_pairs
    from ..benchmark.quality.model import Pretrained
    from ..benchmark.quality.study import Study
    from ..benchmark.quality.training import Recipe
    from ..benchmark.session import Session
    from ..training import resolve_precision

    for name in ("seeds", "epochs", "batch", "length", "examples"):
        if getattr(args, name) is not None:
            check_integer(f"--{name}", getattr(args, name), 2 if name == "length" else 1)
    arms = args.arms or (list(ARMS) if args.full else list(CORE))
    for arm in arms:
        if arm not in ARMS:
            raise AdapterError(f"--arms: got {arm!r}, allowed: {', '.join(ARMS)}")
    pairs = named_pairs(args.data)
    pretrained = Pretrained(args.model, resolve_precision(args.precision), args.length)
    tokenizer = pretrained.tokenizer()
    tasks = {name: load_task(name, files, tokenizer, args.length) for name, files in pairs.items()}
    session = Session(args.resume or args.json, resume=args.resume is not None)
    recipe = Recipe(args.batch, args.epochs)
    return Study(session, pretrained, tasks, recipe, args.examples, arms, args.seeds)
