"""What an allocation that a device refuses ends in: one answer for GPUs and CPUs."""

import torch

_CPU = "DefaultCPUAllocator: "  # its refusal is a plain RuntimeError


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch raised `error` since the device had no more memory."""
    return isinstance(error, torch.OutOfMemoryError) or _CPU in str(error)
