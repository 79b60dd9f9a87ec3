"""Paths of modules and names of their tensors: parts joined by dots."""

from collections.abc import Iterable


def owner_of(name: str) -> str:
    """The path of the module that holds what `name` names; "" for the model itself."""
    return name.rpartition(".")[0]


def leaf_of(name: str) -> str:
    """The last part of `name`."""
    return name.rpartition(".")[2]


def is_within(name: str, roots: Iterable[str]) -> bool:
    """Whether `name` is one of the modules at `roots`, or in one."""
    return any(f"{name}.".startswith(f"{root}.") for root in roots)


def layer_of(path: str) -> str:
    """The path of the layer that `path` is in, which ends in a number; "" where there is none.

    By the first number: later ones are experts and the like.
    """
    parts = path.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdecimal()), -1)
    return ".".join(parts[: place + 1])


def layer_number(path: str) -> int | None:
    """The number of `layer_of`."""
    layer = layer_of(path)
    return int(leaf_of(layer)) if layer else None
