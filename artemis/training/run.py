"""The job that a training file describes."""

import sys
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..allocation import set_dynamic_rank_allocation
from ..automatic import choose_ranks
from ..config import AUTO, HybridAdapterConfig
from ..errors import AdapterError
from ..hybrid import add_hybrid_adapter_to_model
from ..quantization import quantize_adapter_model
from ..quantized_layers import packed_numbers
from .config import BaseConfig, DataConfig, RunConfig, TrainingConfig
from .data import TokenBlocks, load_blocks
from .loading import attention_for, default_device, load_base, resolve_precision
from .progress import show_progress
from .trainer import Trainer


def run_training(config: RunConfig, resume: bool = False) -> dict[str, Any]:
    """Train, save into `training.output_dir`, and evaluate where there is held-out data.

    Args:
        config: the training file.
        resume: go on from the last complete checkpoint of an interrupted run.

    Returns:
        What `artemis train --json` prints. Losses are means over tokens, in nats; `eval_loss` is
        None without held-out data. `lora_rank` says what `lora_rank: auto` chose, else None.

    Raises:
        AdapterError: the model, the data or the configuration cannot be used.
    """
    settings = config.training
    hybrid = config.hybrid_adapter is not None and config.hybrid_adapter.enabled
    dtype = resolve_precision(settings.precision)
    # A frozen base may be held in bf16; weights that are trained need float32's small steps.
    arguments = settings.arguments(autocast=dtype == torch.bfloat16 and not hybrid)
    attention = attention_for(dtype, default_device(), config.data.sequence_length)
    model, tokenizer = load_base(config.model, dtype if hybrid else torch.float32, attention)
    if packed_numbers(model) and not hybrid:
        raise AdapterError(f"model: {config.model!r} is quantized, allowed: with a hybrid_adapter")
    train_data, eval_data = _load_data(config.data, tokenizer)
    chosen = None
    if hybrid:
        if config.base.bits is not None:
            _quantize(model, config.base)
        chosen = _add_adapter(model, config.hybrid_adapter, train_data, settings)

    trainer = Trainer(
        model,
        arguments,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
    )
    show_progress(trainer, "training")
    outcome = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return {
        "output_dir": settings.output_dir,
        "steps": outcome.global_step,
        "train_loss": outcome.training_loss,
        "eval_loss": trainer.evaluate()["eval_loss"] if eval_data else None,
        "tokens_per_second": tokens_per_second(outcome.metrics, config.data.sequence_length),
        "lora_rank": chosen,
        **count_parameters(model),
    }


def _add_adapter(
    model: PreTrainedModel,
    config: HybridAdapterConfig,
    data: TokenBlocks,
    settings: TrainingConfig,
) -> dict[str, Any] | None:
    """Add the adapter; return what was chosen for `lora_rank: auto`, and say it."""
    choice = None
    if config.lora_rank == AUTO:
        choice = choose_ranks(model, data, config, batch_size=settings.batch_size)
        config = choice.config
        print(choice.reason, file=sys.stderr)
    set_seed(settings.seed)
    add_hybrid_adapter_to_model(model, config)
    if choice is None:
        return None
    report = set_dynamic_rank_allocation(
        model, choice.scores, choice.min_rank, choice.max_rank, verbose=False
    )
    print(report, file=sys.stderr)
    return {**choice.to_dict(), "sizes": report.sizes}


def _quantize(model: PreTrainedModel, base: BaseConfig) -> None:
    """Before the adapter is added, which so stays in its own dtype."""
    quantize_adapter_model(
        model, base.bits, format=base.format, group_size=base.group_size,
        activation_bits=base.activation_bits, include_head=base.include_head,
    )  # fmt: skip


def _load_data(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenBlocks, TokenBlocks | None]:
    length, column = config.sequence_length, config.text_column
    train_data = load_blocks(config.train, tokenizer, length, column)
    eval_data = load_blocks(config.eval, tokenizer, length, column) if config.eval else None
    return train_data, eval_data


def tokens_per_second(metrics: dict[str, float], sequence_length: int) -> float:
    """Throughput of training, from the metrics of `Trainer.train`."""
    return metrics["train_samples_per_second"] * sequence_length


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Numbers in the model, and those of them that are trained."""
    parameters = list(model.parameters())
    return {
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(p.numel() for p in parameters) + packed_numbers(model),
    }
