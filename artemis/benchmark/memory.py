"""The largest memory that this process has used."""

import ctypes
import os
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def peak_memory() -> int:
    """Bytes: on a GPU the largest allocation, else the process's largest resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if STATUS.exists():
        # Linux carries getrusage's figure over from the parent process, but not this one.
        return _status("VmHWM")
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> int:
    """Start the peak anew and return what is in use now; where Linux is not, only the latter."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not STATUS.exists():
        return peak_memory()
    # What building the model has freed would count as in use: glibc keeps it for later.
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    _RESET.write_text("5")  # proc(5): VmHWM becomes VmRSS
    return _status("VmRSS")


def total_memory() -> int:
    """Bytes that the GPU, else the machine, has."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties().total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory() -> int:
    """Bytes of it that nobody uses now."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    information = Path("/proc/meminfo")
    if not information.exists():
        return total_memory()
    lines = information.read_text().splitlines()
    line = next(line for line in lines if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def _status(field: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    lines = STATUS.read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
