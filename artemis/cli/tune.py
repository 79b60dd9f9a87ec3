"""`artemis tune`: measure this CPU's choices, or show what would be chosen."""

import argparse
import json

import torch

import artemis_kernels

from ..errors import AdapterError

NAME = "tune"
SUMMARY = "measure which strategy is fastest on this CPU, and keep what wins"
EXAMPLE = (
    "  artemis tune --shapes 2048x8192x64 8192x2048x64 --rows 128 1024\n"
    "  artemis tune --shapes 2048x8192x64 --rows 1024 --show"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", nargs="+", default=["2048x8192x64", "8192x2048x64"],
        metavar="INxOUTxWIDTH", help="bottlenecks on linear layers (default: those of a 1B Llama)",
    )  # fmt: skip
    parser.add_argument(
        "--rows", nargs="+", type=int, default=[128, 1024], metavar="N",
        help="tokens a call (default: 128 1024)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--inference", action="store_true", help="the forward without gradients")
    parser.add_argument(
        "--rounds", type=int, default=7, metavar="N", help="timed rounds (default: 7)"
    )
    parser.add_argument("--table", metavar="FOLDER", help="write here, not in the user's table")
    parser.add_argument("--show", action="store_true", help="measure nothing; show the choices")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> None:
    shapes = [_shape(text) for text in args.shapes]
    for rows in args.rows:
        if rows < 1:
            raise AdapterError(f"--rows: got {rows}, allowed: integers from 1")
    dtype = getattr(torch, args.dtype)
    try:
        if args.show:
            shown = {
                f"{rows} rows, {text}": str(_choice(rows, shape, dtype, not args.inference))
                for text, shape in zip(args.shapes, shapes, strict=True)
                for rows in args.rows
            }
            print(json.dumps(shown, indent=2) if args.json else _lines(shown))
            return
        found = artemis_kernels.tune(
            shapes, args.rows, dtype=dtype, trains=not args.inference, rounds=args.rounds,
            table=args.table,
        )  # fmt: skip
    except ValueError as error:
        raise AdapterError(str(error)) from None
    print(json.dumps(found, indent=2) if args.json else _report(found))


def _shape(text: str) -> tuple[int, int, int]:
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise AdapterError(f"--shapes: got {text!r}, allowed: INxOUTxWIDTH, as in 2048x8192x64")
    return tuple(map(int, sizes))


def _choice(rows: int, shape: tuple[int, int, int], dtype: torch.dtype, trains: bool):
    in_features, out_features, width = shape
    one = torch.zeros(1, 1, dtype=dtype)
    down = torch.zeros(1, 1).expand(width, out_features).detach().requires_grad_(trains)
    return artemis_kernels.explain(
        "adapter_linear", one.expand(rows, in_features), one.expand(out_features, in_features),
        down, one.expand(out_features, width),
    )  # fmt: skip


def _lines(shown: dict[str, str]) -> str:
    return "\n".join(f"{case}: {choice}" for case, choice in shown.items())


def _report(found: dict[str, dict]) -> str:
    lines = []
    for key, times in found["measured"].items():
        timed = ", ".join(f"{name} {ms:.2f} ms" for name, ms in sorted(times.items()))
        kept = found["choices"].get(key)
        lines.append(f"{key}: {timed}; {f'{kept} kept' if kept else 'the heuristic stays'}")
    return "\n".join(lines)
