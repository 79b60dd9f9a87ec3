"""The job that a training file describes."""

from dataclasses import replace
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)

from ..allocation import set_dynamic_rank_allocation
from ..automatic import choose_ranks
from ..config import AUTO, HybridAdapterConfig
from ..errors import AdapterError
from ..hybrid import add_hybrid_adapter_to_model
from ..layers.bank import find_bank
from ..layers.packed import packed_numbers
from ..quantization import quantize_adapter_model
from ..report import count_parameters
from ..saving.adapter_file import read_adapter
from ..targets import find_heads
from .checkpoints import saved_state
from .config import DataConfig, RunConfig
from .data import TokenBlocks, load_blocks
from .divergence import StopWhereDiverged, check_loss, check_parameters
from .graphs import check_arguments
from .loading import attention_for, default_device, load_base, resolve_precision
from .output import prepare_output
from .positions import learned_positions
from .processes import from_first_process, say
from .progress import show_progress
from .throughput import tokens_per_second
from .trainer import Trainer


def run_training(config: RunConfig, resume: bool = False) -> dict[str, Any]:
    """Train, save into `training.output_dir`, and evaluate where there is held-out data.

    Args:
        config: the training file.
        resume: go on from the last complete checkpoint of an interrupted run.

    Returns:
        What `artemis train --json` prints. Losses are means over tokens, in nats; `train_loss` is
        None where a checkpoint had all steps done, `eval_loss` without held-out data. `lora_rank`
        says what `lora_rank: auto` chose, or took up from the checkpoint, else None. Under torchrun
        every process returns it.

    Raises:
        AdapterError: the model, the data, the folder or the configuration cannot be used; or the
            run has diverged.
    """
    settings = config.training
    hybrid = config.trains_adapter
    dtype = resolve_precision(settings.precision)
    heads = hybrid and bool(config.hybrid_adapter.modules_to_save)
    # A frozen base may be held in bf16; weights that are trained need float32's small steps.
    autocast = dtype == torch.bfloat16 and (heads or not hybrid)
    arguments = settings.arguments(autocast)
    if settings.cuda_graphs:
        check_arguments(arguments)
    attention = attention_for(dtype, default_device(), config.data.sequence_length)
    if hybrid and config.hybrid_adapter.fuse_model:
        attention = "sdpa"  # which fusing replaces
    checkpoint = prepare_output(config, resume)
    model, tokenizer = load_base(config.model, dtype if hybrid else torch.float32, attention)
    if packed_numbers(model) and not hybrid:
        raise AdapterError(f"model: {config.model!r} is quantized, allowed: with a hybrid_adapter")
    _check_length(model, config.data.sequence_length)
    train_data, eval_data = _load_data(config.data, tokenizer)
    chosen = None
    if hybrid:
        if config.base.bits is not None:
            _quantize(model, config)
        chosen = _add_adapter(model, config, train_data, arguments.device, checkpoint)
        _widen_heads(model)

    trainer = Trainer(
        model,
        arguments,
        train_dataset=train_data,
        eval_dataset=eval_data,
        # The usual one pads, which needs a token for it; the blocks are equal already.
        data_collator=default_data_collator,
        processing_class=tokenizer,
        cuda_graphs=settings.cuda_graphs,
    )
    show_progress(trainer, "training")
    trainer.add_callback(StopWhereDiverged)
    # Read before the run, which may remove this checkpoint for later ones.
    begun = saved_state(checkpoint)["global_step"] if checkpoint else 0
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    check_loss("the mean loss", outcome.training_loss)
    check_parameters(model)
    trainer.save_model()
    return {
        "output_dir": settings.output_dir,
        "steps": outcome.global_step,
        "train_loss": outcome.training_loss if outcome.global_step > begun else None,
        "eval_loss": _held_out_loss(trainer) if eval_data else None,
        "tokens_per_second": tokens_per_second(trainer, outcome, begun),
        "lora_rank": chosen,
        **count_parameters(model),
    }


def _held_out_loss(trainer: Trainer) -> float:
    loss = trainer.evaluate()["eval_loss"]
    check_loss("the held-out loss", loss)
    return loss


def _check_length(model: PreTrainedModel, sequence_length: int) -> None:
    most = learned_positions(model)
    if most is not None and sequence_length > most:
        raise AdapterError(
            f"data.sequence_length: got {sequence_length}, allowed: up to {most}, the positions"
            " that the model has learned"
        )


def _add_adapter(
    model: PreTrainedModel,
    config: RunConfig,
    data: TokenBlocks,
    device: torch.device,
    checkpoint: str | None,
) -> dict[str, Any] | None:
    """Add the adapter; return what `lora_rank: auto` chose, and say it."""
    adapter, settings = config.hybrid_adapter, config.training
    if adapter.lora_rank != AUTO:
        _add(model, adapter, settings.seed)
        return None
    if checkpoint is not None:
        return _add_as_saved(model, adapter, settings.seed, checkpoint)
    model.to(device)  # where the gradients to choose by are as fast as those of training
    choice = choose_ranks(model, data, adapter, batch_size=settings.batch_size)
    # A GPU's sums may differ in their last bits, and processes must not differ in a rank.
    choice = from_first_process(choice, device)
    say(choice.reason)
    _add(model, choice.config, settings.seed)
    report = set_dynamic_rank_allocation(
        model, choice.scores, choice.min_rank, choice.max_rank, verbose=False
    )
    say(report)
    return {**choice.to_dict(), "sizes": report.sizes}


def _add(model: PreTrainedModel, config: HybridAdapterConfig, seed: int) -> None:
    set_seed(seed)
    add_hybrid_adapter_to_model(model, config)


def _widen_heads(model: PreTrainedModel) -> None:
    """Hold the heads that train in float32, as the adapter is; autocast brings them their input."""
    for head in find_bank(model).heads:
        model.get_submodule(head).float()


def _add_as_saved(
    model: PreTrainedModel, config: HybridAdapterConfig, seed: int, checkpoint: str
) -> dict[str, Any]:
    """Add it with the rank that was chosen when the run began; the trainer loads the sizes."""
    saved = read_adapter(checkpoint)
    rank = saved.config.lora_rank
    _add(model, replace(config, lora_rank=rank), seed)
    reason = f"lora_rank: auto took up the rank {rank}, and each module's, from {checkpoint}"
    say(reason)
    sizes = {site.path: site.size for site in saved.plan.sites}
    return {"rank": rank, "reason": reason, "sizes": sizes}


def _quantize(model: PreTrainedModel, config: RunConfig) -> None:
    """Before the adapter is added, which so stays in its own dtype; not what it trains whole."""
    base = config.base
    paths = [path for path, _ in model.named_modules() if path]
    quantize_adapter_model(
        model, base.bits, format=base.format, group_size=base.group_size,
        activation_bits=base.activation_bits, include_head=base.include_head,
        leave=find_heads(model, config.hybrid_adapter, paths),
    )  # fmt: skip


def _load_data(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenBlocks, TokenBlocks | None]:
    length, column = config.sequence_length, config.text_column
    train_data = load_blocks(config.train, tokenizer, length, column)
    eval_data = load_blocks(config.eval, tokenizer, length, column) if config.eval else None
    return train_data, eval_data
