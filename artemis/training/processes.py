"""Several processes that train together, as torchrun starts them."""

import sys
from typing import Any

import torch
from torch import distributed


def end_processes() -> None:
    """Close the group that training opened, at the end of a program that has done its work.

    The group's threads let go of the tensors they sent when they come to it, and need Python for
    that: where Python has ended by then, the process aborts.
    """
    if _several():
        distributed.destroy_process_group()


def is_first_process() -> bool:
    """Whether this process is the one that reports: under torchrun only one does."""
    return not _several() or distributed.get_rank() == 0


def say(message: object) -> None:
    """Print it to standard error, once for all processes."""
    if is_first_process():
        print(message, file=sys.stderr)


def from_first_process(value: Any, device: torch.device) -> Any:
    """The value that the first process has, for all; `device` is this one's, to send it by."""
    values = [value]
    if _several():
        distributed.broadcast_object_list(values, device=device)
    return values[0]


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
