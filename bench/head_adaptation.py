"""What LoRA on the output head adds to the default hybrid, for tokens of two sizes.

    python -m bench.head_adaptation --out bench/results/head_adaptation.jsonl    # 15 minutes

A small Llama learns Python's sources and is adapted to English, once over single bytes and once
over 4,096 byte pairs, of which English has many that the base hardly saw. Full fine-tuning moves
head and embedding, the hybrid's seven projections do not. What the file holds is not measured
again.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn
from transformers import set_seed
from transformers.utils import logging

from artemis import HybridAdapterConfig, add_hybrid_adapter_to_model
from artemis.benchmark import machine
from artemis.benchmark.records import Record, append, read
from artemis.cli.demo import stages
from artemis.cli.demo.recipe import ADAPTER_YAML, Recipe, Workspace
from artemis.training import Trainer, load_base, show_progress

from .quantized_quality import RECIPE, held_out_loss

TOKENS = {"bytes": 0, "byte pairs": RECIPE.merges}  # -> merges
FULL, HYBRID, WITH_HEAD = "full fine-tuning", "hybrid", "hybrid, LoRA on the head too"
ARMS = (FULL, HYBRID, WITH_HEAD)
SEEDS = range(2)
SIZES = replace(RECIPE, adapt_steps=150)
KIND = "head-adaptation"


def config(arm: str) -> HybridAdapterConfig:
    """The adapter of one of the hybrid arms."""
    usual = HybridAdapterConfig.from_yaml(ADAPTER_YAML)
    if arm == HYBRID:
        return usual
    return replace(
        usual,
        target_modules=[*usual.target_modules, "lm_head"],
        apply_lora_to=[*usual.apply_lora_to, "lm_head"],
    )


def adapted(space: Workspace, arm: str, seed: int) -> tuple[nn.Module, int]:
    """The base adapted by an arm, and how many parameters trained."""
    full, recipe = arm == FULL, space.recipe
    model, _ = load_base(str(space.base), torch.float32 if full else torch.bfloat16)
    set_seed(seed)
    if not full:
        add_hybrid_adapter_to_model(model, config(arm))
    rate = recipe.adapt_full_rate if full else recipe.adapt_hybrid_rate
    arguments = recipe.training(space.directory, recipe.adapt_steps, rate).arguments(autocast=full)
    arguments.seed = arguments.data_seed = seed
    trainer = Trainer(args=arguments, train_dataset=space.training_data("new"))
    show_progress(trainer, f"{arm}, seed {seed}")
    trainer.train(model)
    return model, sum(p.numel() for p in model.parameters() if p.requires_grad)


def losses(space: Workspace, tokens: str, done: set[tuple]) -> Iterator[Record]:
    """Held-out losses not yet `done`, in nats a token: of the base, then of each seed's arms."""
    about = {"kind": KIND, "tokens": tokens}
    if (tokens, None, None) not in done:
        base, _ = load_base(str(space.base), torch.bfloat16)
        yield {**about, "arm": None, "seed": None, "loss": held_out_loss(base, space)}
    for seed in SEEDS:
        for arm in ARMS:
            if (tokens, arm, seed) not in done:
                model, count = adapted(space, arm, seed)
                loss = held_out_loss(model, space)
                yield {**about, "arm": arm, "seed": seed, "loss": loss, "parameters": count}


def run(directory: Path, out: Path, recipe: Recipe = SIZES) -> None:
    """Measure what `out` lacks, and append it, one run after the other."""
    known = [r for r in (read(out) if out.exists() else []) if r["kind"] == KIND]
    done = {(r["tokens"], r["arm"], r["seed"]) for r in known}
    head = None
    for tokens, merges in TOKENS.items():
        space = Workspace(directory / tokens.replace(" ", "-"), replace(recipe, merges=merges))
        space.directory.mkdir(parents=True, exist_ok=True)
        if not space.base_is_ready():
            stages.base(space)
        for record in losses(space, tokens, done):
            if head is None:
                facts = machine.facts()
                head = {"kind": "run", "run": facts["time"], **facts, "recipe": asdict(recipe)}
                append(out, [head])
            append(out, [{"run": head["run"], **record}])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.head_adaptation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument(
        "--directory", type=Path, default=Path("artemis-demo/head"), metavar="DIR",
        help="where the base models go (default: %(default)s)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    run(options.directory, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
