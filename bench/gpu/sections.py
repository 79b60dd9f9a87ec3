"""The sections of a run, most important first: parts, shares of its time, and rows."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch

from artemis.benchmark.operations import OPERATIONS

from . import accuracy, frozen, machinery

#: Of the first section; each is a process.
PROVED = tuple(
    f"{operation}/{way}"
    for operation, ways in (
        accuracy.STRATEGIES | {"frozen_linear": frozen.BASES, "machinery": machinery.CASES}
    ).items()
    for way in ways
)

#: Name -> (its parts, each a process, side by side; its share of all minutes).
SECTIONS = {
    "accuracy": (PROVED, 0.24),
    "products": (("",), 0.07),
    "tuning": (("",), 0.09),
    "kernels": (("",), 0.22),
    "groups": (("",), 0.08),
    "packed": (("",), 0.08),
    "models": (("",), 0.22),
}
Row = dict[str, Any]


def rows_of(name: str, part: str, device: torch.device, tiny: bool, rounds: int) -> Iterator[Row]:
    """The rows of a section; later ones import only what they need, so that none fails another."""
    if name == "accuracy":
        return _proved(*part.split("/"), device, tiny)
    if name == "groups":
        from .between import between
        from .groups import groups
        from .loss import losses

        parts = (losses, between, groups)
        return chain.from_iterable(part(device, tiny, rounds) for part in parts)
    if name == "products":
        from .products import products as rows
    elif name == "tuning":
        from .tuning import tuning as rows
    elif name == "kernels":
        from .operations import operations as rows
    elif name == "packed":
        from .packed import packed as rows
    else:
        from .models import models as rows
    return rows(device, tiny, rounds)


def _proved(wanted: str, way: str, device: torch.device, tiny: bool) -> Iterator[Row]:
    if wanted == "machinery":
        return machinery.check(way, device, tiny)
    if wanted == "frozen_linear":
        return frozen.check(way, device, tiny)
    (operation,) = (op for op in OPERATIONS if op.name == wanted)
    return accuracy.check(operation, way, device, tiny)
