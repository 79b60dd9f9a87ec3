"""Files that appear whole or not at all, whenever the process dies."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from uuid import uuid4


def replace_files(directory: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write each file beside its place, then move all into `directory`; the last one commits."""
    staged: dict[str, Path] = {}
    try:
        for name, write in writers.items():
            staged[name] = directory / f".{name}.{uuid4().hex}.tmp"
            write(staged[name])
            _sync(staged[name])
        for name, path in staged.items():
            os.replace(path, directory / name)
        if hasattr(os, "O_DIRECTORY"):  # elsewhere a directory cannot be opened
            _sync(directory)
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
