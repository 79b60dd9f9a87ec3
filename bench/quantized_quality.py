"""What a base in few bits costs in quality: the demo's task in a smaller model, several seeds.

    python -m bench.quantized_quality --out bench/results/quantized_quality.jsonl

A small Llama over 4,096 byte pairs learns Python's sources; in each seed the default hybrid learns
English over the base in bf16, int8 (with and without its output head) and int4, with the same
start, data and steps. Each adapter is then read over the base it trained on, and the one from bf16
also over every other form; what a head passes on is read in each way to round it. Bytes and errors
of weights are those of one layer of Llama 2 7B's width, at random. What the file holds is not
measured again.
"""

import argparse
import copy
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed
from transformers.utils import logging

from artemis import HybridAdapterConfig, add_hybrid_adapter_to_model, quantize_adapter_model
from artemis.benchmark import machine
from artemis.benchmark.models import architecture, build
from artemis.benchmark.records import Record, append, read
from artemis.cli.demo import stages
from artemis.cli.demo.recipe import ADAPTER_YAML, Recipe, Workspace
from artemis.training import Trainer, load_base, show_progress

from . import logits_rounding

RECIPE = Recipe(
    hidden_size=256, intermediate_size=704, layers=3, heads=4, merges=4096 - 257, base_steps=1000,
    adapt_steps=200,
)  # fmt: skip
SEEDS = range(5)
#: How a base may be held: options of `quantize_adapter_model`, or None for as it is, in bf16.
FORMS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "int8": dict(bits=8),
    "int8 and head": dict(bits=8, include_head=True),
    "int8, weight-only": dict(bits=8, activation_bits=16),
    "fp8": dict(bits=8, format="fp8"),
    "int4": dict(bits=4),
    "int4, with data": dict(bits=4),
}
TRAINED_ON = ("bf16", "int8", "int8 and head", "int4")
KIND, SIZES = "quantized-quality", "quantized-sizes"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quantized_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument(
        "--directory", type=Path, default=Path("artemis-demo/quantized"), metavar="DIR",
        help="where the base model goes (default: %(default)s)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    known = read(options.out) if options.out.exists() else []
    if not any(record["kind"] == SIZES for record in known):
        append(options.out, list(sizes("llama-2-7b")))
    run(Workspace(options.directory, RECIPE), options.out, SEEDS)
    return 0


def sizes(model: str) -> Iterator[Record]:
    """Bytes of one layer's packed weights over those of 16 bits, and their errors, by format."""
    one_layer = replace(architecture(model), layers=1, vocabulary=64)
    for form in ("int8", "fp8", "int4"):
        packed = build(one_layer, torch.bfloat16, 16)
        report = quantize_adapter_model(packed, **FORMS[form]).quantization_report
        errors = [layer.snr_db for layer in report.layers]
        yield {
            "kind": SIZES, "model": model, "form": form, "of_16_bits": report.of_16_bits,
            "snr_db": [min(errors), max(errors)],
        }  # fmt: skip


def run(space: Workspace, out: Path, seeds: range) -> None:
    """Measure what `out` lacks, and append it, one adapter after the other."""
    known = read(out) if out.exists() else []
    done = {(r["seed"], r["trained_on"]) for r in known if r["kind"] == KIND}
    wanted = [(seed, form) for seed in seeds for form in TRAINED_ON if (seed, form) not in done]
    rounded = any(record["kind"] == logits_rounding.KIND for record in known)
    if not wanted and rounded:
        return
    space.directory.mkdir(parents=True, exist_ok=True)
    if not space.base_is_ready():
        stages.base(space)
    head = {"kind": "run", **machine.facts(), "recipe": asdict(space.recipe)}
    head["run"] = head["time"]
    append(out, [head])
    if not rounded:
        append(out, [{"run": head["run"], **record} for record in logits_rounding.errors(space)])
    for seed, form in wanted:
        print(f"seed {seed}, trained over {form}", file=sys.stderr)
        append(out, [{"run": head["run"], **record} for record in losses(space, seed, form)])


def losses(space: Workspace, seed: int, form: str) -> Iterator[Record]:
    """Train over `form`; a record for each form that the adapter is read over."""
    model, _ = load_base(str(space.base), torch.bfloat16)
    held(model, form, space)
    if seed == SEEDS[0] and form == TRAINED_ON[0]:
        for other in FORMS:  # the base alone
            plain = held(copy.deepcopy(model), other, space)
            yield _record(seed, None, other, held_out_loss(plain, space))
    set_seed(seed)
    add_hybrid_adapter_to_model(model, HybridAdapterConfig.from_yaml(ADAPTER_YAML))
    settings = space.recipe.training(
        space.directory, space.recipe.adapt_steps, space.recipe.adapt_hybrid_rate
    )
    arguments = settings.arguments(autocast=False)
    arguments.seed = arguments.data_seed = seed
    trainer = Trainer(args=arguments, train_dataset=space.training_data("new"))
    show_progress(trainer, f"seed {seed}, {form}")
    trainer.train(model)
    for other in FORMS if form == TRAINED_ON[0] else (form,):
        moved = model if other == form else held(copy.deepcopy(model), other, space)
        yield _record(seed, form, other, held_out_loss(moved, space))


def held(model: nn.Module, form: str, space: Workspace) -> nn.Module:
    """The model with its base held as `form` says, its adapter in 32 bits; in place."""
    options = FORMS[form]
    if options is None:
        return model
    data = space.training_data("new") if form.endswith("with data") else None
    return quantize_adapter_model(model, adapter_bits=32, data=data, progress=False, **options)


@torch.no_grad()
def held_out_loss(model: nn.Module, space: Workspace) -> float:
    """Nats a token on the held-out English."""
    model.eval()
    blocks = space.held_out_data("new").blocks.long()
    parts = blocks.split(space.recipe.batch_size)
    return sum(model(input_ids=p, labels=p).loss.item() * len(p) for p in parts) / len(blocks)


def _record(seed: int, trained_on: str | None, form: str, loss: float) -> Record:
    return {"kind": KIND, "seed": seed, "trained_on": trained_on, "form": form, "loss": loss}


if __name__ == "__main__":
    sys.exit(main())
