"""`artemis tune`: measure this machine's choices, or show what would be chosen and why."""

import argparse
import json

import torch

import artemis_kernels
from artemis_kernels import Choice, QuantizedWeight

from ..errors import AdapterError

NAME = "tune"
SUMMARY = "measure which strategy is fastest on this machine, and keep what wins"
EXAMPLE = (
    "  artemis tune --shapes 2048x8192x64 8192x2048x64 --rows 128 1024\n"
    "  artemis tune --op quantized_linear --weight int8:auto --inference --rows 1 8 64\n"
    "  artemis tune --shapes 2048x8192x64 --rows 1024 --show"
)
_GROUP = 128  # weights that share an int4 scale, in what --show asks about


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--op", default="adapter_linear",
        choices=("lora_linear", "adapter_linear", "bottleneck_adapter", "quantized_linear"),
    )  # fmt: skip
    parser.add_argument(
        "--shapes", nargs="+", default=["2048x8192x64", "8192x2048x64"],
        metavar="INxOUTxWIDTH", help="layers and their width or rank (default: a 1B Llama's)",
    )  # fmt: skip
    parser.add_argument(
        "--rows", nargs="+", type=int, default=[128, 1024], metavar="N",
        help="tokens a call (default: 128 1024)",
    )  # fmt: skip
    parser.add_argument(
        "--weight", default="tensor", metavar="FORMAT:BITS",
        help="tensor (default), or a packed one as int8:auto, int4:16",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--inference", action="store_true", help="the forward without gradients")
    parser.add_argument("--dropout", action="store_true", help="with dropout drawn")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument(
        "--rounds", type=int, default=9, metavar="N", help="timed rounds (default: 9)"
    )
    parser.add_argument("--table", metavar="FOLDER", help="write here, not in the user's table")
    parser.add_argument("--show", action="store_true", help="measure nothing; show the choices")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> None:
    shapes = [_shape(text) for text in args.shapes]
    for rows in args.rows:
        if rows < 1:
            raise AdapterError(f"--rows: got {rows}, allowed: integers from 1")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise AdapterError(f"--device: got {args.device!r}, and torch sees no GPU; allowed: cpu")
    try:
        print(_shown(args, shapes) if args.show else _measured(args, shapes))
    except (ValueError, artemis_kernels.Unavailable) as error:
        raise AdapterError(str(error)) from None


def _shape(text: str) -> tuple[int, int, int]:
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise AdapterError(f"--shapes: got {text!r}, allowed: INxOUTxWIDTH, as in 2048x8192x64")
    return tuple(map(int, sizes))


def _shown(args: argparse.Namespace, shapes: list[tuple[int, int, int]]) -> str:
    choices = {
        f"{rows:,} rows, {text}": _choice(args, rows, shape)
        for text, shape in zip(args.shapes, shapes, strict=True)
        for rows in args.rows
    }
    if not args.json:
        return "\n".join(f"{case}: {choice}" for case, choice in choices.items())
    return json.dumps(
        {
            case: {"impl": one.impl, "strategy": one.strategy, "reason": one.reason}
            for case, one in choices.items()
        },
        indent=2,
    )


def _choice(args: argparse.Namespace, rows: int, shape: tuple[int, int, int]) -> Choice:
    """What such a call takes, asked with tensors of one number, expanded."""
    k, n, width = shape
    one = torch.zeros(1, 1, dtype=getattr(torch, args.dtype), device=args.device)
    learns = not args.inference
    x, options = one.expand(rows, k).detach(), {"dropout_p": 0.1 if args.dropout else 0.0}
    if args.op == "quantized_linear":
        x, options = x.requires_grad_(learns), {}
        return artemis_kernels.explain(args.op, x, _weight(args.weight, n, k, one), **options)
    first = k if args.op == "lora_linear" else n
    down = one.float().expand(width, first).detach().requires_grad_(learns)
    up = one.expand(n, width)
    if args.op == "bottleneck_adapter":
        return artemis_kernels.explain(args.op, one.expand(rows, n), down, up, **options)
    scale = (1.0,) if args.op == "lora_linear" else ()
    weight = _weight(args.weight, n, k, one)
    return artemis_kernels.explain(args.op, x, weight, down, up, *scale, **options)


def _weight(kind: str, n: int, k: int, one: torch.Tensor) -> torch.Tensor | QuantizedWeight:
    """A weight [n, k] of a kind: one number, expanded."""
    if kind == "tensor":
        return one.expand(n, k)
    format, _, bits = kind.partition(":")
    bits = int(bits) if bits.isdecimal() else bits or "auto"
    device = one.device
    if format == "int4":
        group = next((g for g in (_GROUP, 64, 32, 16, 8) if k % g == 0), _GROUP)
        scale = torch.zeros(1, 1, dtype=torch.bfloat16, device=device).expand(n, k // group)
        data = torch.zeros(1, 1, dtype=torch.uint8, device=device).expand(n, k // 2)
        return QuantizedWeight(data, scale, scale, format, group, bits)
    dtype = torch.float8_e4m3fn if format == "fp8" else torch.int8
    data = torch.zeros(1, 1, device=device).to(dtype).expand(n, k)
    scale = torch.zeros(1, device=device).expand(n)
    return QuantizedWeight(data, scale, None, format, None, bits)


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
