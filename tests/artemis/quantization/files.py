"""The file of a quantized base, read and changed past the library."""

import json

from safetensors import safe_open
from safetensors.torch import load_file, save_file

FILE = "quantized_base.safetensors"


def header(path) -> dict:
    with safe_open(path / FILE, framework="pt") as file:
        return json.loads(file.metadata()["quantized_base"])


def rewritten(path, change) -> None:
    """The file at `path` after `change(header, tensors)`."""
    tensors, values = load_file(path / FILE), header(path)
    change(values, tensors)
    save_file(tensors, path / FILE, {"quantized_base": json.dumps(values)})
