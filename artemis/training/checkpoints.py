"""The checkpoints in the folder of a run: which there are, and which of them is complete."""

import json
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import AdapterError
from ..saving.adapter_file import PARAMETERS_FILE


def complete_checkpoint(checkpoint: str | bool, output_dir: str, hybrid: bool) -> str:
    """The path of the checkpoint to resume from; True stands for the last complete one.

    Args:
        hybrid: whether it must hold an adapter. What a whole model needs transformers looks for.

    Raises:
        AdapterError: it does not exist, its saving was cut short, or it holds no adapter.
    """
    if checkpoint is True:
        found = [path for path in checkpoints(Path(output_dir)) if not _missing(path, hybrid)]
        if not found:
            kind = " of an adapter" if hybrid else ""
            raise AdapterError(
                f"no complete checkpoint under {output_dir!r} to resume a run{kind} from"
            )
        return str(found[-1])
    if reason := _missing(Path(checkpoint), hybrid):
        raise AdapterError(f"{str(checkpoint)!r} is not a complete checkpoint: {reason}")
    return str(checkpoint)


def holds_adapter(checkpoint: str | Path) -> bool:
    """Whether a checkpoint is of a run that trained an adapter."""
    return Path(checkpoint, PARAMETERS_FILE).is_file()


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


def _missing(checkpoint: Path, hybrid: bool) -> str:
    """What a checkpoint cannot do without and lacks, in words; empty where it lacks nothing."""
    try:
        saved_state(checkpoint)
    except (OSError, ValueError):
        return f"{TRAINER_STATE_NAME}, which is written last, is missing or cut short"
    return f"{PARAMETERS_FILE} is missing" if hybrid and not holds_adapter(checkpoint) else ""
