"""Rates of a run: of the tokens that it really trained on, and of the steps that it really made."""

from math import ceil

from transformers import Trainer
from transformers.trainer_utils import TrainOutput


def tokens_per_second(trainer: Trainer, output: TrainOutput, begun: int = 0) -> float:
    """Throughput of `trainer.train`, which returned `output` and went on after step `begun`.

    transformers takes every batch of `max_steps` for a full one; an epoch's last one often is not.
    """
    arguments, data = trainer.args, trainer.train_dataset
    before, after = (
        examples_trained(
            steps, len(data), arguments.per_device_train_batch_size,
            arguments.gradient_accumulation_steps, arguments.world_size,
        )
        for steps in (begun, output.global_step)
    )  # fmt: skip
    tokens = (after - before) * data.blocks.shape[1]
    return tokens / output.metrics["train_runtime"] if tokens else 0.0


def of_this_call(output: TrainOutput, begun: int, max_steps: int) -> TrainOutput:
    """Loss and rates of the steps after `begun`, where they were divided by those of all."""
    steps = output.global_step - begun
    loss = output.training_loss * output.global_step / max(steps, 1)
    rates = ("train_samples_per_second", "train_steps_per_second")
    metrics = {
        name: value * steps / max_steps if name in rates else value
        for name, value in output.metrics.items()
    }
    return TrainOutput(output.global_step, loss, metrics | {"train_loss": loss})


def examples_trained(
    steps: int, examples: int, batch_size: int, accumulation: int = 1, processes: int = 1
) -> int:
    """How many examples the first `steps` optimizer steps of a run see, all processes together.

    An epoch ends with what is left: a batch that is not full, a step of fewer batches. Several
    processes get equally many full batches, for which some examples come twice.
    """
    together = batch_size * processes
    batches = ceil(examples / together)
    an_epoch = examples if processes == 1 else batches * together
    epochs, rest = divmod(steps, ceil(batches / accumulation))
    return epochs * an_epoch + min(rest * accumulation * together, an_epoch)
