"""What a user asks to have tuned or shown: checked, and as the cases of calls."""

import torch

from ..core import call
from ..core import device as devices
from ..core.strategies import DTYPES, FROZEN, OPERATIONS, TENSOR, WEIGHTS, Case

#: Operations of several members that read one x, and the operation of each.
GROUPS = {"lora_linear_group": "lora_linear", "adapter_linear_group": "adapter_linear"}


def calls_of(op: str, shapes: tuple, rows: tuple, *options) -> dict[tuple, tuple[Case, ...]]:
    """The cases of each call by its shape and rows: one, or those of a group's members.

    `shapes` of a group are those of its members, and all of them its key.
    """
    if op in GROUPS:
        return {
            (shapes, m): tuple(case_of(GROUPS[op], m, *shape, *options) for shape in shapes)
            for m in rows
        }
    return {(shape, m): (case_of(op, m, *shape, *options),) for shape in shapes for m in rows}


def case_of(op, m, k, n, width, dtype, weight, trains, drops) -> Case:
    """What a call of these sizes looks up."""
    k = 0 if op == "bottleneck_adapter" else k
    weight = TENSOR if op == "bottleneck_adapter" else weight
    width, drops = (0, False) if op == "quantized_linear" else (width, drops)
    trains, drops = (False, False) if op.startswith(FROZEN) else (trains, drops)
    return Case(op, m, k, n, width, dtype, weight, trains, drops)


def check(name: str, shapes, rows, rounds: int, op: str, weight: str, dtype: str) -> None:
    """Raise the ValueError of `name`'s arguments, if they are wrong."""
    known = sorted({*OPERATIONS, *GROUPS})
    if op not in known:
        raise ValueError(f"{name}: op must be one of {known}, got {op!r}")
    if weight not in WEIGHTS:
        raise ValueError(f"{name}: weight must be one of {sorted(WEIGHTS)}, got {weight!r}")
    if op == "quantized_linear" and weight == TENSOR:
        raise ValueError(
            f"{name}: quantized_linear needs a packed weight, as int8:auto, got {TENSOR!r}"
        )
    if dtype not in DTYPES:
        raise ValueError(f"{name}: dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
    for shape in shapes:
        if len(shape) != 3:
            raise ValueError(f"{name}: a shape must be (in, out, width), got {shape}")
    for size in (*rows, rounds, *(size for shape in shapes for size in shape)):
        if size < 1:
            raise ValueError(f"{name}: sizes, rows and rounds must be at least 1, got {size}")
    reads = sorted({shape[0] for shape in shapes})
    if op in GROUPS and len(reads) != 1:
        raise ValueError(f"{name}: members of a group read one x, of one size in, got {reads}")


def check_device(name: str, device: torch.device, dtype: str) -> None:
    """The same for a device that kernels are to run on, or torch's paths on a CPU."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: device must be 'cpu' or 'cuda', got {str(device)!r}")
    if device.type == "cuda":
        seen = devices.gpu_count()
        if (device.index or 0) >= seen:
            found = f"{seen} GPU{'s' * (seen > 1)}" if seen else "no GPU"
            raise ValueError(
                f"{name}: device {str(device)!r} was asked for, and torch sees {found}"
            )
        check_dtype(name, dtype)


def check_kernels(name: str, device: torch.device, dtype: str) -> None:
    """The same for what kernels are to be timed on, where they cannot run."""
    why = None if device.type == "cpu" else call.why_no_kernels(getattr(torch, dtype), device)
    if why is not None:
        raise ValueError(f"{name}: the kernels cannot run on {str(device)!r}: {why}")


def check_dtype(name: str, dtype: str) -> None:
    """The same for the dtype of a call of kernels."""
    if dtype == "float64":
        raise ValueError(f"{name}: the kernels take float16, bfloat16 and float32, not float64")
