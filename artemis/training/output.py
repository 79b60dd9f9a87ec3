"""The folder that a run writes to: what it must not hold, and that it can be written.

All of it is looked at before anything is loaded, so that no hour of training ends in an error.
"""

from pathlib import Path
from tempfile import NamedTemporaryFile

from ..errors import AdapterError, listed
from .checkpoints import checkpoints, complete_checkpoint, holds_adapter
from .config import RunConfig


def prepare_output(config: RunConfig, resume: bool) -> str | None:
    """Make the folder of a run; return the checkpoint to go on from, None where a run begins.

    Raises:
        AdapterError: there is no checkpoint to resume from, or it is of an adapter and the run is
            not; or, with `training.output_dir` named, the folder is the base's own and what is
            saved would take its place, it holds checkpoints that a later `--resume` could take for
            this run's, or it cannot be written.
    """
    folder = Path(config.training.output_dir)
    _refuse_the_base(config, folder)
    checkpoint = None
    if resume:
        checkpoint = complete_checkpoint(True, str(folder), config.trains_adapter)
        _refuse_another_kind(config, checkpoint)
    elif found := checkpoints(folder):
        raise AdapterError(
            f"training.output_dir: got {str(folder)!r}, which holds"
            f" {listed(path.name for path in found)} of an earlier run, allowed: --resume to go on"
            " with that run, another folder, or this one without checkpoints"
        )
    require_writable(folder, "training.output_dir")
    return checkpoint


def _refuse_another_kind(config: RunConfig, checkpoint: str) -> None:
    if holds_adapter(checkpoint) and not config.trains_adapter:
        raise AdapterError(
            f"hybrid_adapter: absent or not enabled, and {checkpoint} is of an adapter, allowed:"
            " the section that the run began with"
        )


def _refuse_the_base(config: RunConfig, folder: Path) -> None:
    if folder.resolve() != Path(config.model).resolve():
        return
    hybrid = config.trains_adapter
    # An adapter's files have names of their own. But a folder made for them where the model is not
    # one would hide the model of that name.
    if not (hybrid and folder.is_dir()):
        raise AdapterError(
            f"training.output_dir: got {str(folder)!r}, which is the model that is trained,"
            " allowed: another folder, so that the model stays"
        )


def require_writable(folder: Path, name: str) -> None:
    """Make `folder`, and write a file there that is removed again.

    Raises:
        AdapterError: it cannot be done; `name` is what the user calls the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, prefix=".artemis-"):
            pass
    except OSError as error:
        raise AdapterError(
            f"{name}: got {str(folder)!r}, allowed: a folder that can be written ({error.strerror})"
        ) from None
