"""Passes over CPU tensors, compiled by the system's C compiler: a strategy beside plain torch.

The C files of this folder are compiled once per machine into the user's cache directory and called
through `ctypes`. Where there is no compiler, or it fails, `library()` says why and callers take
their plain-torch path, which computes the same function.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-std=c11", "-fPIC", "-ffp-contract=off", "-fopenmp")


class Native(NamedTuple):
    """The loaded library, or None and the reason in one sentence."""

    handle: ctypes.CDLL | None
    reason: str


NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}  # of the passes, by what they read


def library_for(x: torch.Tensor) -> ctypes.CDLL | None:
    """The library where it has passes for x, else None."""
    if x.device.type != "cpu" or x.dtype not in NAMES:
        return None
    return library().handle


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
    for name, signature in _signatures(handle):
        function = getattr(handle, name)
        function.restype = None
        function.argtypes = [_TYPES[word] for word in signature.split()]
    return Native(handle, f"compiled by {compiler}")


_TYPES = {
    "pointer": ctypes.c_void_p,
    "size": ctypes.c_int64,
    "seed": ctypes.c_uint64,
    "threshold": ctypes.c_uint32,
    "factor": ctypes.c_float,
    "flag": ctypes.c_int,
    "threads": ctypes.c_int,
}
_MASK = "seed threshold factor"


def has(handle: ctypes.CDLL, product: str) -> bool:
    """Whether the compiler knew the processor's instructions for `int8_product`, `thin_product`."""
    return bool(ctypes.c_int.in_dll(handle, f"artemis_has_{product}").value)


def _signatures(handle: ctypes.CDLL) -> Iterator[tuple[str, str]]:
    """Name and argument types of every pass."""
    sizes = "size size size"
    for dtype in NAMES.values():
        yield f"artemis_dropout_{dtype}", f"pointer pointer size {_MASK} flag threads"
        yield f"artemis_shrink_{dtype}", f"pointer pointer pointer {sizes} {_MASK} threads"
        yield (
            f"artemis_units_forward_{dtype}",
            f"pointer pointer {sizes} factor flag {_MASK} threads",
        )
        yield (
            f"artemis_units_backward_{dtype}",
            f"pointer pointer pointer pointer {sizes} factor factor flag {_MASK} threads",
        )
        yield (
            f"artemis_round_{dtype}",
            f"pointer pointer pointer size factor pointer size {'pointer ' * 4}size size threads",
        )
        yield f"artemis_round_logits_{dtype}", f"{'pointer ' * 6}size size threads"
        yield (
            f"artemis_cross_entropy_forward_{dtype}",
            "pointer pointer pointer pointer size size size threads",
        )
        yield (
            f"artemis_cross_entropy_backward_{dtype}",
            "pointer pointer pointer pointer pointer size size size threads",
        )
        if has(handle, "int8_product"):
            yield (
                f"artemis_int8_product_{dtype}",
                f"{'pointer ' * 7}size {'pointer ' * 3}size pointer size size flag size factor"
                f" pointer {sizes} flag flag threads",
            )
        yield (
            f"artemis_restore_{dtype}",
            "pointer pointer pointer pointer pointer size size threads",
        )
        yield f"artemis_add_restored_{dtype}", "pointer pointer pointer size size threads"
        yield f"artemis_unpack_{dtype}", f"pointer pointer pointer pointer {sizes} flag threads"
    for product in ("outer", "expand"):
        yield f"artemis_{product}_f32", f"pointer pointer pointer {sizes} {_MASK} threads"
    if has(handle, "thin_product"):
        yield (
            "artemis_thin_product",
            f"{'pointer size size flag ' * 2}pointer size pointer factor pointer size flag"
            f" {sizes} threads",
        )
    yield (
        "artemis_few_rows",
        f"pointer pointer pointer pointer pointer {sizes} size flag threads",
    )
    yield (
        "artemis_few_rows_bf16",
        f"pointer pointer pointer pointer pointer pointer size {sizes} size flag threads",
    )
    yield (
        "artemis_frozen_bf16",
        f"{'pointer ' * 10}{sizes} size size factor flag flag flag threads",
    )


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
        objects, linked = [], Path(scratch, "native.so")
        for source in sorted(_FOLDER.glob("*.c")):
            objects.append(str(Path(scratch, source.stem + ".o")))
            _run(compiler, *_FLAGS, "-c", str(source), "-o", objects[-1])
        _run(compiler, "-shared", *objects, "-o", str(linked), "-lm")
        os.replace(linked, target)
    return target


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _fingerprint(compiler: str) -> str:
    """Names what the machine code depends on: source, flags, compiler, processor."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout
    cpu = torch.backends.cpu.get_cpu_capability() + str(sorted(_processor_flags()))
    sources = (file.read_bytes() for file in sorted(_FOLDER.glob("*.[ch]")))
    parts = (*sources, " ".join(_FLAGS).encode(), version, cpu.encode())
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
