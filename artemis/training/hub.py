"""What of an adapter goes to the Hub while its training runs."""

import shutil
from pathlib import Path

from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from ..saving.adapter_file import CONFIG_FILE, PARAMETERS_FILE


def lay_out(trainer: Trainer, checkpoint: str) -> None:
    """Copy a checkpoint's adapter to where the trainer pushes from, if it is about to push.

    transformers pushes `output_dir`, and copies into it, by name, files that no adapter has. Where
    it waits for an earlier push the files stay as they are, since that one reads them.
    """
    arguments = trainer.args
    if not trainer.is_world_process_zero() or arguments.hub_strategy == HubStrategy.END:
        return
    running = trainer.push_in_progress  # which the first process alone has
    if running is not None and not running.is_done() and not arguments.hub_always_push:
        return
    for name in (PARAMETERS_FILE, CONFIG_FILE):
        shutil.copy(Path(checkpoint, name), arguments.output_dir)
