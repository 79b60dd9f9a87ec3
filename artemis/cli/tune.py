"""`artemis tune`: measure this machine's choices, or show what would be chosen and why."""

import argparse
import json
import re
from dataclasses import asdict

import torch

import artemis_kernels

from ..errors import AdapterError
from ..schema import check_integer

NAME = "tune"
SUMMARY = "measure which strategy is fastest on this machine, and keep what wins"
EXAMPLE = (
    "  artemis tune --shapes 2048x8192x64 8192x2048x64 --rows 128 1024\n"
    "  artemis tune --op quantized_linear --weight int8:auto --inference --rows 1 8 64\n"
    "  artemis tune --shapes 2048x8192x64 --rows 1024 --show --chip sm_90"
)
_OPERATIONS = (
    "lora_linear", "adapter_linear", "bottleneck_adapter", "quantized_linear",
    "frozen_linear:lora", "frozen_linear:folded", "frozen_linear:plain",
    "lora_linear_group", "adapter_linear_group",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--op", default="adapter_linear", choices=_OPERATIONS,
        help="the operation (default: adapter_linear)",
    )  # fmt: skip
    parser.add_argument(
        "--shapes", nargs="+", default=["2048x8192x64", "8192x2048x64"],
        metavar="INxOUTxWIDTH",
        help="layers and their width or rank (default: a 1B Llama's); of a group, its members",
    )  # fmt: skip
    parser.add_argument(
        "--rows", nargs="+", type=int, default=[128, 1024], metavar="N",
        help="tokens a call (default: 128 1024)",
    )  # fmt: skip
    parser.add_argument(
        "--weight", default="tensor", metavar="FORMAT:BITS",
        help="tensor (default), or a packed one as int8:auto, int4:16",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16",
        help="of x (default: bfloat16)",
    )  # fmt: skip
    parser.add_argument("--inference", action="store_true", help="the forward without gradients")
    parser.add_argument("--dropout", action="store_true", help="with dropout drawn")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument(
        "--rounds", type=int, default=9, metavar="N", help="timed rounds (default: 9)"
    )
    parser.add_argument("--table", metavar="FOLDER", help="write here, not in the user's table")
    parser.add_argument(
        "--show", action="store_true", help="measure nothing; show the choices, and a GPU's tiles"
    )
    parser.add_argument(
        "--chip", metavar="NAME", help="with --show: those of a GPU that need not be here, as sm_90"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> None:
    shapes = [_shape(text) for text in args.shapes]
    for rows in args.rows:
        check_integer("--rows", rows)
    if args.chip and not args.show:
        raise AdapterError("--chip: nothing is measured on a chip that is not here; add --show")
    if args.table and args.show:
        raise AdapterError(
            "--table: --show tells what calls read, which is no FOLDER; leave it out"
        )
    _check_device(args.device)
    try:
        print(_shown(args, shapes) if args.show else _measured(args, shapes))
    except (ValueError, artemis_kernels.Unavailable) as error:
        raise AdapterError(str(error)) from None


def _check_device(device: str) -> None:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise AdapterError(f"--device: got {device!r}, allowed: cpu, cuda or cuda:N")
    if device != "cpu" and not torch.cuda.is_available():
        raise AdapterError(f"--device: got {device!r}, and torch sees no GPU; allowed: cpu")


def _shape(text: str) -> tuple[int, int, int]:
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise AdapterError(f"--shapes: got {text!r}, allowed: INxOUTxWIDTH, as in 2048x8192x64")
    return tuple(map(int, sizes))


def _shown(args: argparse.Namespace, shapes: list[tuple[int, int, int]]) -> str:
    found = artemis_kernels.choices(
        shapes, args.rows, op=args.op, weight=args.weight, dtype=args.dtype,
        trains=not args.inference, dropout_p=0.1 if args.dropout else 0.0,
        device=args.chip or args.device,
    )  # fmt: skip
    choices = {f"{rows:,} rows, {_sizes(shapes)}": one for (shapes, rows), one in found.items()}
    if args.json:
        return json.dumps({case: _as_json(one) for case, one in choices.items()}, indent=2)
    return "\n".join(
        "\n".join((f"{case}: {_sentence(one)}", *map(_tiles_line, one.tiles)))
        for case, one in choices.items()
    )


def _sizes(shapes: tuple) -> str:
    """As they were asked for; those of a group joined by plus signs."""
    in_group = isinstance(shapes[0], tuple)
    return " + ".join("x".join(map(str, shape)) for shape in (shapes if in_group else (shapes,)))


def _as_json(one) -> dict:
    tiles = [tile._replace(config=asdict(tile.config))._asdict() for tile in one.tiles]
    return {"impl": one.impl, "strategy": one.strategy, "reason": one.reason, "tiles": tiles}


def _sentence(one) -> str:
    return f"{one.op}: {one.impl} / {one.strategy}, because {one.reason}"


def _tiles_line(tile) -> str:
    sizes = ", ".join(f"{name} {size}" for name, size in asdict(tile.config).items() if size)
    origin = tile.origin if tile.origin == "default" else f"the {tile.origin} table"
    return f"  {tile.kernel} {tile.shape}: {sizes} ({origin})"


def _measured(args: argparse.Namespace, shapes: list[tuple[int, int, int]]) -> str:
    found = artemis_kernels.tune(
        shapes, args.rows, op=args.op, weight=args.weight, dtype=args.dtype,
        trains=not args.inference, dropout_p=0.1 if args.dropout else 0.0, device=args.device,
        rounds=args.rounds, table=args.table,
    )  # fmt: skip
    if args.json:
        return json.dumps(found, indent=2)
    lines = [_line(key, entry) for part in found.values() for key, entry in part.items()]
    return "\n".join(lines) or "nothing to choose: one strategy serves these calls"


def _line(key: str, entry: dict) -> str:
    timed = ", ".join(
        f"{name} {median:.3g} ms ({fast:.3g}–{slow:.3g})"
        for name, (fast, median, slow) in sorted(entry["ms"].items())
    )
    chosen = entry["chosen"]
    end = "the built-in choice stays" if chosen == entry["usual"] else f"{chosen} kept"
    return f"{key}: {timed}; {end}"
