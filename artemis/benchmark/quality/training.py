"""Training and testing one arm."""

import tempfile
import time
from dataclasses import dataclass

import torch
from transformers import (
    PrinterCallback,
    TrainingArguments,
    get_linear_schedule_with_warmup,
    set_seed,
)

from ...training import Trainer, default_device
from ..memory import forget_peak, peak_memory
from .arms import FAMILIES, Arm
from .data import Batch, Examples, Task, random_batches
from .model import Classifier, Pretrained, outputs

#: The head's own learning rate, the same in all arms: it starts where the frozen arm's ends.
HEAD_RATE = 1e-3
_WARMUP, _CLIP = 0.1, 1.0


@dataclass(frozen=True)
class Recipe:
    """What all arms have in common: examples a step, and passes over the training examples."""

    batch_size: int
    epochs: int


@dataclass(frozen=True)
class Outcome:
    """A trained arm's logits fp32 [examples, classes], and what it took."""

    logits: torch.Tensor
    seconds: float
    steps: int
    trained_parameters: int
    peak_memory: int  # bytes, beyond what the process held before
    sizes: dict[str, int]


def train_and_test(
    pretrained: Pretrained,
    task: Task,
    arm: Arm,
    start: torch.nn.Linear,
    rate: float,
    seed: int,
    recipe: Recipe,
    train: Examples,
    test: Examples,
) -> Outcome:
    """Train `arm` from the head `start`; `seconds` are those of preparing and training it."""
    held = forget_peak()
    model = pretrained.classifier(task.classes, FAMILIES[arm.family].frozen)
    model.head.load_state_dict(start.state_dict())
    batches = random_batches(train, recipe.batch_size, seed, task.pad)
    begin = time.perf_counter()
    set_seed(seed)
    arm.prepare(model, batches, seed)
    steps = 0
    if arm.family != "head":
        steps = _train(pretrained, model, batches, rate, seed, recipe)
    seconds = time.perf_counter() - begin
    peak = max(peak_memory() - held, 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    bank = getattr(model, "hybrid_adapter", None)
    sizes = {} if bank is None else {path: site.spec.size for path, site in bank.sites.items()}
    logits = outputs(pretrained, model, test, task.pad)
    return Outcome(logits, seconds, steps, trained or _numbers(model.head), peak, sizes)


def _numbers(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _train(
    pretrained: Pretrained,
    model: Classifier,
    batches: list[Batch],
    rate: float,
    seed: int,
    recipe: Recipe,
) -> int:
    """AdamW without decay, a linear schedule; the order of the batches is `seed`'s alone."""
    head = list(model.head.parameters())
    own = {id(parameter) for parameter in head}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    optimizer = torch.optim.AdamW(
        [{"params": rest, "lr": rate}, {"params": head, "lr": HEAD_RATE}],
        weight_decay=0.0,
        fused=True,
    )
    steps = len(batches) * recipe.epochs
    schedule = get_linear_schedule_with_warmup(optimizer, round(_WARMUP * steps), steps)
    whole = next(model.encoder.parameters()).dtype == torch.float32 != pretrained.dtype
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory,
            per_device_train_batch_size=1,  # an item of `batches` is a batch
            num_train_epochs=recipe.epochs,
            max_grad_norm=_CLIP,
            bf16=whole and pretrained.dtype == torch.bfloat16,
            use_cpu=default_device().type == "cpu",
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=batches,
            data_collator=_only,
            optimizers=(optimizer, schedule),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer.train().global_step


def _only(items: list[Batch]) -> Batch:
    (item,) = items
    return item
