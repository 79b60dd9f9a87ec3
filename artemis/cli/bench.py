"""`artemis bench`: what operations, training steps and decoding cost on this machine."""

import argparse
import sys
from pathlib import Path

from ..benchmark.arms import ARMS, DECODING, TRAINING
from ..errors import AdapterError
from ..schema import check_integer
from . import bench_quality

NAME = "bench"
SUMMARY = "measure training, decoding, memory and single operations on this machine"
EXAMPLE = (
    "  artemis bench train\n"
    "  artemis bench train --models llama-2-7b --rounds 4 --json train.jsonl --plot train.png\n"
    "  artemis bench kernels --full --resume kernels.jsonl"
)
_CHOICES = {
    "train": "a training step of whole models: time, memory and FLOPs against full fine-tuning",
    "kernels": "operations on real layer shapes, against their peers and their floor",
    "decode": "reading a prompt and decoding after it, adapters unmerged",
    "memory": "peak memory of a training step, states and activations apart",
    bench_quality.NAME: bench_quality.SUMMARY,
}
_INSTALLED = "all whose packages are installed"
#: What an example of a benchmark cannot do without.
_NEEDS = {"quality": " --model DIR --data trec.train.jsonl trec.test.jsonl"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, summary in _CHOICES.items():
        kind = kinds.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  artemis bench {name}{_NEEDS.get(name, '')} --json {name}.jsonl"
            f" --plot {name}.png",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _ADD[name](kind)
        kind.add_argument("--full", action="store_true", help="the whole grid, not its core")
        kind.add_argument(
            "--plot", type=Path, metavar="FILE.png", help="draw a picture (needs matplotlib)"
        )
        files = kind.add_mutually_exclusive_group()
        files.add_argument("--json", type=Path, metavar="FILE", help="append results, JSON lines")
        files.add_argument(
            "--resume", type=Path, metavar="FILE",
            help="append to FILE, and measure only what it does not hold yet",
        )  # fmt: skip


def _add_model_arguments(
    parser: argparse.ArgumentParser, arms: tuple[str, ...], default: str = _INSTALLED
) -> None:
    parser.add_argument(
        "--models", nargs="+", metavar="NAME",
        help="HIDDENxLAYERS, or llama-3.2-1b, llama-2-7b, llama-2-13b, llama-3-70b"
        " (default: 512x8 1024x6 2048x2; with --full the named ones too)",
    )  # fmt: skip
    parser.add_argument(
        "--arms", nargs="+", metavar="NAME",
        help=f"of {', '.join(arms)} (default: {default})",
    )  # fmt: skip
    parser.add_argument(
        "--measure", choices=("auto", "whole", "parts"), default="auto",
        help="whole models, or parts: one and two layers, extrapolated; auto (the default):"
        " parts of the named Llamas",
    )  # fmt: skip


def _add_training_arguments(parser: argparse.ArgumentParser, default: str = _INSTALLED) -> None:
    _add_model_arguments(parser, TRAINING, default)
    parser.add_argument(
        "--tokens", nargs="+", type=int, metavar="N",
        help="tokens a step (default: 1024; with --full 2048, 8192 and 32768 too)",
    )  # fmt: skip
    parser.add_argument(
        "--sequence", type=int, default=128, metavar="N", help="tokens a sequence (default: 128)"
    )


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_training_arguments(parser, f"{_INSTALLED}, but for the checkpointed ones")
    parser.add_argument(
        "--compile", action="store_true", help="every arm under torch.compile; no memory is shown"
    )
    _add_rounds(parser, 8)


def _add_decode(parser: argparse.ArgumentParser) -> None:
    _add_model_arguments(parser, DECODING)
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="prompts (default: 1)")
    parser.add_argument(
        "--prompt", nargs="+", type=int, metavar="N",
        help="tokens a prompt (default: 128; with --full 1024 too)",
    )  # fmt: skip
    _add_rounds(parser, 8)


def _add_rounds(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument(
        "--rounds", type=int, default=default, metavar="N",
        help=f"timed rounds, in which all arms take turns (default: {default})",
    )  # fmt: skip


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", help="whose layers (default: llama-3.2-1b)"
    )
    parser.add_argument(
        "--layers", nargs="+", metavar="NAME",
        help="of q, k, v, o, gate, up, down, block and groups: qkv, gate_up (default: all but k, v,"
        " o and up; with --full all)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", nargs="+", type=int, metavar="N",
        help="rows of x (default: 1 and 1024; with --full up to 32768)",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", nargs="+", type=int, metavar="N",
        help="of LoRA; bottlenecks are eight times as wide (default: 8; with --full 16 and 64 too)",
    )  # fmt: skip
    _add_rounds(parser, 10)


_ADD = {
    "train": _add_train,
    "kernels": _add_kernels,
    "decode": _add_decode,
    "memory": _add_training_arguments,
    bench_quality.NAME: bench_quality.add_arguments,
}


def run(args: argparse.Namespace) -> None:
    if args.benchmark == bench_quality.NAME:
        bench_quality.run(args)
        return
    from ..benchmark import plots  # here: the other commands need none of it
    from ..benchmark.session import Session
    from ..benchmark.tables import text

    if "rounds" in args:
        check_integer("--rounds", args.rounds, 2)
    if args.plot is not None:
        plots.require_matplotlib()
    work = _RUN[args.benchmark](args)
    session = Session(args.resume or args.json, resume=args.resume is not None)
    print(_headline(session.head), file=sys.stderr)
    rows = work(session)
    print(text(args.benchmark, rows))
    if args.plot is not None and args.benchmark == "kernels":
        from ..benchmark.kernels import peaks_of

        plots.roofline(args.plot, rows, peaks_of(session))
    elif args.plot is not None:
        plots.bars(args.plot, args.benchmark, rows)
    wrong = [row for row in rows if row.get("gate", {}).get("passed") is False]
    if wrong:
        raise AdapterError(f"not timed, since inaccurate: {', '.join(r['what'] for r in wrong)}")


def _settings(
    args: argparse.Namespace,
    tokens: list[int],
    sequence: int,
    arms: tuple[str, ...],
    default: tuple[str, ...],
    compiled: bool = False,
):
    """`arms` are allowed, `default` is what is measured where none is asked for."""
    from ..benchmark.models import MODELS, SMALL
    from ..benchmark.settings import settings

    models = args.models or list(MODELS if args.full else SMALL)
    for arm in args.arms or ():
        if arm not in arms:
            raise AdapterError(f"--arms: got {arm!r}, allowed: {', '.join(arms)}")
    return settings(models, tokens, sequence, args.arms or default, args.measure, compiled)


def _training(args: argparse.Namespace, recomputing: bool, compiled: bool = False):
    """`recomputing`: whether arms with activation checkpointing are among the default ones.

    Not all of those can be compiled, and `compiled` allows none; nor fused ones, which the compiler
    makes of the others.
    """
    check_integer("--sequence", args.sequence, 2)
    tokens = args.tokens or ([1024, 2048, 8192, 32768] if args.full else [1024])
    arms = tuple(
        name
        for name in TRAINING
        if not (compiled and (ARMS[name].recomputes or ARMS[name].is_fused))
    )
    default = tuple(
        name for name in arms if ARMS[name].installed and (recomputing or not ARMS[name].recomputes)
    )
    return _settings(args, tokens, args.sequence, arms, default, compiled)


def _train(args: argparse.Namespace):
    from ..benchmark import train
    from ..training.compiling import require_compiler

    if args.compile:
        require_compiler("--compile")
    wanted = _training(args, recomputing=False, compiled=args.compile)
    return lambda session: train.run(session, wanted, args.rounds)


def _memory(args: argparse.Namespace):
    from ..benchmark import footprint

    wanted = _training(args, recomputing=True)
    return lambda session: footprint.run(session, wanted)


def _decode(args: argparse.Namespace):
    from ..benchmark import decode

    prompts = args.prompt or ([128, 1024] if args.full else [128])
    check_integer("--batch", args.batch)
    for prompt in prompts:
        check_integer("--prompt", prompt, 2)
    default = tuple(name for name in DECODING if ARMS[name].installed)
    wanted = [
        setting
        for prompt in prompts
        for setting in _settings(args, [args.batch * prompt], prompt, DECODING, default)
    ]
    return lambda session: decode.run(session, wanted, args.rounds)


def _kernels(args: argparse.Namespace):
    from ..benchmark import kernels

    wanted = kernels.workloads(args.models, args.layers, args.tokens, args.ranks, args.full)
    return lambda session: kernels.run(session, wanted, args.rounds)


_RUN = {"train": _train, "kernels": _kernels, "decode": _decode, "memory": _memory}


def _headline(head: dict) -> str:
    chip = (head["gpu"] or head["processor"])["name"]
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    return f"bench: {chip}, {head['threads']} threads; {versions}"
