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
            _sync(staged[name], os.O_RDWR)  # Windows flushes only what it may write
        for name, path in staged.items():
            os.replace(path, directory / name)
        if hasattr(os, "O_DIRECTORY"):  # elsewhere a directory cannot be opened
            _sync(directory, os.O_RDONLY)
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)


def _sync(path: Path, mode: int) -> None:
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
