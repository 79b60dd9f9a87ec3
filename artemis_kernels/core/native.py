"""Passes with a dropout mask, compiled by the system's C compiler: a strategy beside plain torch.

The source, `native.c`, is compiled once per machine into the user's cache directory and called
through `ctypes`. Where there is no compiler, or it fails, `library()` says why and callers take
their plain-torch path, which drops the same elements.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-march=native", "-std=c11", "-fPIC", "-ffp-contract=off", "-fopenmp")


class Native(NamedTuple):
    """The loaded library, or None and the reason in one sentence."""

    handle: ctypes.CDLL | None
    reason: str


@functools.cache
def library() -> Native:
    """Compile (once per machine) and load the native passes."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return Native(None, "no C compiler (cc, gcc, clang) is on the PATH")
    try:
        handle = ctypes.CDLL(str(_built(compiler)))
    except subprocess.CalledProcessError as error:
        return Native(None, f"{compiler} failed: {error.stderr.strip().splitlines()[-1:]}")
    except OSError as error:
        return Native(None, f"the compiled library could not be kept or loaded: {error}")
    for kind in ("f32", "bf16"):
        _declare(handle, f"artemis_dropout_{kind}", "pointer pointer size", "flag")
        for product in ("shrink", "outer", "expand"):
            shapes = "pointer pointer pointer size size size"
            _declare(handle, f"artemis_{product}_{kind}", shapes)
    return Native(handle, f"compiled by {compiler}")


def _declare(handle: ctypes.CDLL, name: str, first: str, last: str = "") -> None:
    """Set the argument types of a pass: its own, those of the mask, the number of threads."""
    kinds = {
        "pointer": ctypes.c_void_p,
        "size": ctypes.c_int64,
        "seed": ctypes.c_uint64,
        "threshold": ctypes.c_uint32,
        "keep_scale": ctypes.c_float,
        "flag": ctypes.c_int,
        "threads": ctypes.c_int,
    }
    function = getattr(handle, name)
    function.restype = None
    words = f"{first} seed threshold keep_scale {last} threads".split()
    function.argtypes = [kinds[word] for word in words]


def _built(compiler: str) -> Path:
    """Path of the shared library, compiled now unless an earlier run did.

    Compiled with OpenMP but linked without it: the runtime torch has loaded serves both, where a
    second one would fight it for the cores.
    """
    folder = Path.home() / ".cache" / "artemis_kernels"
    target = folder / f"native-{_fingerprint(compiler)}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        compiled, linked = Path(scratch, "native.o"), Path(scratch, "native.so")
        for command in (
            [compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked), "-lm"],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(linked, target)
    return target


def _fingerprint(compiler: str) -> str:
    """Names what the machine code depends on: source, flags, compiler, processor."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout
    cpu = torch.backends.cpu.get_cpu_capability() + str(sorted(_processor_flags()))
    parts = (_SOURCE.read_bytes(), " ".join(_FLAGS).encode(), version, cpu.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _processor_flags() -> set[str]:
    """Instruction-set flags of this processor: a home folder may be shared by unlike machines."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return set()
    for line in information.read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()
