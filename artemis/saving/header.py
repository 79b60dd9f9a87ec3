"""The header of our safetensors files: one JSON object in the metadata, and the tensors' shapes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import AdapterError

#: Name -> (safetensors dtype, shape).
Shapes = dict[str, tuple[str, tuple[int, ...]]]


def read_header(path: Path, key: str, version: int, whose: str) -> tuple[dict[str, Any], Shapes]:
    """Return the JSON object under `key` in the metadata of the file at `path`, and its tensors.

    Raises `AdapterError` where the file is damaged, is not `whose`, or of a format other than
    `version`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except SafetensorError as error:
        raise AdapterError(f"{path}: damaged, or no safetensors file ({error})") from None
    if key not in metadata:
        raise AdapterError(f"{path}: a safetensors file, but not {whose}")
    with damage_named(path):
        header = json.loads(metadata[key])
        given = header["format_version"]
    if given != version:
        raise AdapterError(
            f"{path}: got format version {given!r}, allowed: {version}; a newer artemis wrote it"
        )
    return header, tensors


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Within it, what a header lacks or holds in another form is one `AdapterError`."""
    try:
        yield
    except AdapterError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{path}: its header is damaged ({error!r})") from None
