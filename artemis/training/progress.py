"""Progress of a training run on standard error."""

import sys

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers import Trainer as BaseTrainer


class TrainingProgress(TrainerCallback):
    """One bar per run where standard error is a terminal, one line per log elsewhere.

    The callbacks of transformers write the logs to standard output, which belongs to results.
    """

    def __init__(self, description: str):
        self.description = description
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(
                desc=self.description,
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                disable=None,
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or not logs:
            return
        if "eval_loss" in logs:
            self._write(state, f"held-out loss {logs['eval_loss']:.4f}")
        elif "loss" not in logs:
            return
        elif self.bar.disable:
            self._write(state, f"loss {logs['loss']:.4f}")
        else:
            self.bar.set_postfix(loss=f"{logs['loss']:.4f}")

    def _write(self, state, message: str) -> None:
        step = f"step {state.global_step}/{state.max_steps}"
        tqdm.write(f"{self.description}: {step}: {message}", file=sys.stderr)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def show_progress(trainer: BaseTrainer, description: str) -> None:
    """Replace a trainer's own progress bars and log lines by `TrainingProgress`."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TrainingProgress(description))
