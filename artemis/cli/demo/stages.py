"""The demo's stages, each run in a process of its own so that its peak memory is its own.

`python -m artemis.cli.demo.stages STAGE DIRECTORY [--text FILE] [--quick]` runs one and writes what
it measured to `DIRECTORY/results/STAGE.json`.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedModel, set_seed
from transformers.utils import logging

from artemis import (
    HybridAdapterConfig,
    add_hybrid_adapter_to_model,
    load_hybrid_adapter,
    quantize_adapter_model,
)
from artemis.benchmark.memory import peak_memory
from artemis.training import (
    TokenBlocks,
    Trainer,
    TrainingConfig,
    attention_for,
    count_parameters,
    default_device,
    load_base,
    resolve_precision,
    show_progress,
    tokens_per_second,
)

from ..generate import continue_text
from .recipe import ADAPTER_YAML, QUICK, Recipe, Workspace

SEED = 0
PROMPT_CHARACTERS = 80
NEW_TOKENS = 300


def base(space: Workspace) -> dict:
    """Train the base model on source code from nothing."""
    recipe, tokenizer = space.recipe, space.tokenizer()
    train = space.training_data("old")
    set_seed(SEED)
    model = LlamaForCausalLM(recipe.model_config(len(tokenizer), tokenizer.eos_token_id))
    partial = space.directory / "base.partial"
    settings = recipe.training(partial, recipe.base_steps, recipe.base_rate)
    outcome = _train(model, settings, train, "base model")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial_recipe = partial / space.base_recipe.name
    partial_recipe.write_text(json.dumps(space.describe_base()))
    partial.rename(space.base)
    return outcome


def frozen(space: Workspace) -> dict:
    """Measure the base as it is: where both other arms start."""
    memory = peak_memory()
    model, _ = _load(space, resolve_precision("auto"))
    return {"trainable_parameters": 0, **_losses(model, space), **_memory(memory)}


def full(space: Workspace) -> dict:
    """Fine-tune every weight: float32 weights, bf16 products where the device has them."""
    recipe, output = space.recipe, space.directory / "full"
    train = space.training_data("new")
    memory = peak_memory()
    model, _ = _load(space, torch.float32)
    settings = recipe.training(output, recipe.adapt_steps, recipe.adapt_full_rate)
    measured = _train(model, settings, train, "full fine-tuning")
    measured |= _losses(model, space) | _memory(memory)
    model.save_pretrained(output)
    return measured | {"saved_bytes": (output / "model.safetensors").stat().st_size}


def hybrid(space: Workspace) -> dict:
    """Train the hybrid adapter of the YAML file over the frozen base, and save only the adapter."""
    return _hybrid(space, space.directory / "hybrid", "hybrid adapter", bits=None)


def hybrid_int8(space: Workspace) -> dict:
    """The same over the base in 8 bits."""
    return _hybrid(space, space.directory / "hybrid-int8", "hybrid, 8-bit base", bits=8)


def _hybrid(space: Workspace, output: Path, description: str, bits: int | None) -> dict:
    recipe, train = space.recipe, space.training_data("new")
    memory = peak_memory()
    model, _ = _load(space, resolve_precision("auto"))
    if bits is not None:
        model = quantize_adapter_model(model, bits)
    set_seed(SEED)
    model = add_hybrid_adapter_to_model(model, HybridAdapterConfig.from_yaml(ADAPTER_YAML))
    settings = recipe.training(output, recipe.adapt_steps, recipe.adapt_hybrid_rate)
    measured = _train(model, settings, train, description)
    measured |= _losses(model, space) | _memory(memory)
    model.save_adapter_parameters(output)
    saved = (output / "hybrid_adapter.safetensors").stat().st_size
    return measured | {"saved_bytes": saved}


def reload(space: Workspace) -> dict:
    """Load the saved adapter onto the base, measure its loss again and continue a held-out text."""
    model, tokenizer = _load(space, resolve_precision("auto"))
    model = load_hybrid_adapter(model, space.directory / "hybrid")
    losses = _losses(model, space)
    _, held_out = space.documents("new")
    prompt = held_out[0][:PROMPT_CHARACTERS]
    text, _ = continue_text(model.eval(), tokenizer, prompt, NEW_TOKENS)
    return losses | {"prompt": prompt, "generated": text[len(prompt) :]}


def _load(space: Workspace, dtype: torch.dtype):
    """The base model and its tokenizer, with the attention that is fastest for every arm alike."""
    attention = attention_for(
        resolve_precision("auto"), default_device(), space.recipe.sequence_length
    )
    return load_base(str(space.base), dtype, attention)


def _train(
    model: PreTrainedModel, settings: TrainingConfig, data: TokenBlocks, description: str
) -> dict:
    trainer = Trainer(args=_arguments(model, settings), train_dataset=data)
    show_progress(trainer, description)
    outcome = trainer.train(model)
    return {"tokens_per_second": tokens_per_second(trainer, outcome), **count_parameters(model)}


def _losses(model: PreTrainedModel, space: Workspace) -> dict:
    """Held-out loss on both domains, in nats per byte."""
    settings = space.recipe.training(space.directory, 1, 1.0)
    trainer = Trainer(model, _arguments(model, settings))
    show_progress(trainer, "evaluation")
    return {
        f"{domain}_loss": trainer.evaluate(space.held_out_data(domain))["eval_loss"]
        for domain in ("new", "old")
    }


def _arguments(model: PreTrainedModel, settings: TrainingConfig):
    # Float32 weights under autocast, or weights that are bf16 already: products alike in every arm.
    wanted = resolve_precision("auto")
    return settings.arguments(autocast=wanted == torch.bfloat16 and model.dtype != wanted)


def _memory(before: int) -> dict:
    peak = peak_memory()
    return {"peak_memory_bytes": peak, "training_memory_bytes": peak - before}


STAGES = {stage.__name__: stage for stage in (base, frozen, full, hybrid, hybrid_int8, reload)}


def main() -> None:
    """Run the stage that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    space = Workspace(args.directory, QUICK if args.quick else Recipe(), args.text)
    measured = STAGES[args.stage](space)
    results = args.directory / "results"
    results.mkdir(exist_ok=True)
    (results / f"{args.stage}.json").write_text(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
