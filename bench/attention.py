"""Which attention trains faster, torch's fused one or the plain one, by precision and length.

    python -m bench.attention --out bench/results/cpu_attention.jsonl

Times forward and dX of a frozen model, which every arm of every benchmark runs, with both, in
turns: what `artemis.training.attention_for` decides by.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from artemis.benchmark import machine
from artemis.benchmark.models import Architecture, build, random_tokens
from artemis.benchmark.records import append
from artemis.benchmark.turns import Spread, interleaved

from .floors import stop_gradients_before_attention

SIZES = Architecture(hidden=512, intermediate=1376, layers=4, vocabulary=256)
TOKENS = 1024
LENGTHS = (128, 256, 512, 1024)
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=8, help="timed rounds, two more warm up")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="TOKENS")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append JSON lines to FILE")
    options = parser.parse_args(arguments)
    for precision, dtype in PRECISIONS.items():
        for length in options.lengths:
            record = measure(precision, dtype, length, options.rounds)
            print(f"{precision} {length:5} tokens: {record['ms']}", flush=True)
            if options.out is not None:
                append(options.out, [machine.facts() | record])
    return 0


def measure(precision: str, dtype: torch.dtype, length: int, rounds: int) -> dict:
    """Milliseconds with either attention, as a record."""
    times = interleaved({name: _step(name, dtype, length) for name in ("sdpa", "eager")}, rounds)
    return {
        "kind": "attention",
        "precision": precision,
        "sequence": length,
        "tokens": TOKENS,
        "ms": {name: Spread.of(values).to_dict(1) for name, values in times.items()},
    }


def _step(attention: str, dtype: torch.dtype, length: int) -> Callable[[], None]:
    model = stop_gradients_before_attention(build(SIZES, dtype, length))
    model.set_attn_implementation(attention)
    batch = random_tokens(SIZES.vocabulary, max(1, TOKENS // length), length)
    return lambda: model(input_ids=batch, labels=batch).loss.backward()


if __name__ == "__main__":
    sys.exit(main())
