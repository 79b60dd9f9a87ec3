"""Files that appear whole or not at all, whenever the process dies."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_IMODE
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from ..errors import AdapterError

_DAY = 24 * 60 * 60  # seconds
#: In what torch.save raises, a plain RuntimeError: a file of torch's source, and C++'s own words.
_TORCH_SAVE = ("inline_container", "iostream error")


def replace_files(directory: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write each file into a folder beside their place, then move all; the last one commits.

    A file has the permissions of the one that it replaces, else those of any new file. What a
    killed process leaves behind, `.artemis-*.tmp`, a later call removes once it is a day old.
    `directory` is made where it is missing.

    Raises `AdapterError` where a file is in its place; `OSError`, with the path, where a file
    cannot be written. The old files stay.
    """
    if directory.exists() and not directory.is_dir():
        raise AdapterError(f"{directory}: got a file, allowed: a directory")
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(".tmp", ".artemis-", directory, ignore_cleanup_errors=True) as folder:
        staged = Path(folder)
        _remove_leftovers(directory, staged.stat().st_mtime)
        for name, write in writers.items():
            _write(write, staged / name, directory / name)
        for name in writers:
            os.replace(staged / name, directory / name)
        if hasattr(os, "O_DIRECTORY"):  # elsewhere a directory cannot be opened
            _sync(directory, os.O_RDONLY)


@contextmanager
def naming(place: str | os.PathLike) -> Iterator[None]:
    """Turn what is raised where a file cannot be written, and names none, into an `OSError`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _names_no_file(error):
            raise
        raise OSError(f"{place}: not written ({error})") from error


def _names_no_file(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno is not None and error.filename is None
    return isinstance(error, SafetensorError) or any(words in str(error) for words in _TORCH_SAVE)


def _write(write: Callable[[Path], object], path: Path, place: Path) -> None:
    path.touch()
    mode = _mode(place if place.exists() else path)
    try:
        write(path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{place}: not written ({error})") from error
    _sync(path, os.O_RDWR)  # Windows flushes only what it may write
    if _mode(path) != mode:  # safetensors writes for the owner alone; not all file systems have any
        path.chmod(mode)


def _remove_leftovers(directory: Path, now: float) -> None:
    """`now` by the clock of the file system; what was written to within a day may be alive."""
    for folder in directory.glob(".artemis-*.tmp"):
        with suppress(OSError):  # another process may remove it, too
            newest = max(_modified(path) for path in (folder, *folder.iterdir()))
            if newest < now - _DAY:
                shutil.rmtree(folder)


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _mode(path: Path) -> int:
    return S_IMODE(path.stat().st_mode)


def _sync(path: Path, mode: int) -> None:
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
