"""The checkpoints in the folder of a run: which there are, and which of them is complete."""

import json
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import AdapterError


def complete_checkpoint(checkpoint: str | bool, output_dir: str) -> str:
    """The path of the checkpoint to resume from; True stands for the last complete one.

    Raises:
        AdapterError: it does not exist, or its saving was cut short.
    """
    if checkpoint is True:
        found = [path for path in checkpoints(Path(output_dir)) if _is_complete(path)]
        if not found:
            raise AdapterError(f"no complete checkpoint under {output_dir!r} to resume from")
        return str(found[-1])
    if not _is_complete(Path(checkpoint)):
        raise AdapterError(
            f"{str(checkpoint)!r} is not a complete checkpoint: {TRAINER_STATE_NAME}, which is "
            "written last, is missing or cut short"
        )
    return str(checkpoint)


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoint folders in a directory, in the order of their steps."""
    numbered = {}
    for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal():
            numbered[int(step)] = path
    return [numbered[step] for step in sorted(numbered)]


def saved_state(checkpoint: str | Path) -> dict[str, Any]:
    """The trainer's state that a checkpoint holds."""
    return json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text())


def _is_complete(checkpoint: Path) -> bool:
    try:
        saved_state(checkpoint)
    except (OSError, ValueError):
        return False
    return True
