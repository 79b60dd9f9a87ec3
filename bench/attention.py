"""Which attention is faster, torch's fused one, the plain one or ours, in training, for prompts and
for one token.

    python -m bench.attention --out bench/results/cpu_attention.jsonl

Times, with each, in turns, by precision and length: forward and dX of a frozen model, which every
arm of every benchmark runs, as `artemis.training.attention_for` decides by; a prompt read; and a
token decoded after as many others, where each query head has keys of its own and where four share
them.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from artemis.benchmark import machine
from artemis.benchmark.arms import TrainingStep
from artemis.benchmark.decoding import NEW_TOKENS, Token
from artemis.benchmark.models import Architecture, build, random_tokens
from artemis.benchmark.records import Record, append
from artemis.benchmark.turns import Spread, interleaved
from artemis.training import keep_freed_memory

from .floors import stop_gradients_before_attention

SIZES = Architecture(hidden=512, intermediate=1376, layers=4, vocabulary=256)
HEADS, KEY_VALUE_HEADS = 8, (8, 2)
ATTENTIONS = ("sdpa", "eager", "artemis")
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
    kept = keep_freed_memory()
    for precision, length in itertools.product(PRECISIONS, options.lengths):
        records = [
            trained(precision, length, options.rounds),
            read(precision, length, options.rounds),
        ]
        records += [decoded(precision, length, heads, options.rounds) for heads in KEY_VALUE_HEADS]
        for record in records:
            print(json.dumps(record), flush=True)
            if options.out is not None:
                append(options.out, [machine.facts(keeps_memory=kept) | record])
    return 0


def trained(precision: str, length: int, rounds: int) -> Record:
    """Milliseconds of `TOKENS` tokens, forward and dX."""

    def step(attention: str) -> Callable[[], None]:
        model = stop_gradients_before_attention(build(SIZES, PRECISIONS[precision], length))
        model.set_attn_implementation(attention)
        batch = random_tokens(SIZES.vocabulary, max(1, TOKENS // length), length)
        return lambda: model(input_ids=batch, labels=batch).loss.backward()

    times = interleaved({name: step(name) for name in ATTENTIONS}, rounds)
    shape = {"precision": precision, "sequence": length, "tokens": TOKENS}
    return {"kind": "attention", **shape, "ms": _spreads(times)}


def read(precision: str, length: int, rounds: int) -> Record:
    """Milliseconds of one prompt."""
    model = build(SIZES, PRECISIONS[precision], length).eval()
    prompt = random_tokens(SIZES.vocabulary, 1, length)

    def run(attention: str) -> Callable[[], None]:
        def forward() -> None:
            model.set_attn_implementation(attention)
            with torch.inference_mode():
                model(input_ids=prompt, logits_to_keep=1)

        return forward

    times = interleaved({name: run(name) for name in ATTENTIONS}, rounds)
    shape = {"precision": precision, "sequence": length}
    return {"kind": "attention-prompt", **shape, "ms": _spreads(times)}


def decoded(precision: str, length: int, key_value_heads: int, rounds: int) -> Record:
    """Milliseconds of one token."""
    sizes = replace(SIZES, heads=HEADS, key_value_heads=key_value_heads)

    def run(attention: str) -> Callable[[], None]:
        model = build(sizes, PRECISIONS[precision], length + NEW_TOKENS).eval()
        token = Token(TrainingStep(model, random_tokens(sizes.vocabulary, 1, length)))
        model.set_attn_implementation(attention)
        return token.run

    times = interleaved({name: run(name) for name in ATTENTIONS}, rounds)
    each = {name: [ms / NEW_TOKENS for ms in values] for name, values in times.items()}
    shape = {"precision": precision, "sequence": length, "key_value_heads": key_value_heads}
    return {"kind": "attention-token", **shape, "heads": HEADS, "ms": _spreads(each, 3)}


def _spreads(times: dict[str, list[float]], digits: int = 1) -> Record:
    return {name: Spread.of(values).to_dict(digits) for name, values in times.items()}


if __name__ == "__main__":
    sys.exit(main())
