"""Passes over CPU tensors, compiled by the system's C compiler: a strategy beside plain torch.

The C files of this folder are compiled once per machine into the user's cache directory and called
through `ctypes`. Where no compiler serves, `library()` warns once, saying why, and callers take
their plain-torch path, which computes the same function.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ..device import cache_folder, has_bf16_dots, processor_flags

_FOLDER = Path(__file__).parent
_COMPILERS = ("gcc", "cc", "clang")  # gcc first: its OpenMP runtime is most often torch's too
_FIRST = "units.c"  # refers to no other
_FLAGS = (
    "-O3",
    "-march=native",
    "-std=c11",
    "-fPIC",
    "-ffp-contract=off",
    "-fopenmp",
    "-falign-loops=64",
)


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


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a pass finds its numbers; who calls holds the tensor until the pass is done."""
    return None if tensor is None else tensor.data_ptr()


def why_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the passes for such tensors are not there; None if they are, or were never written."""
    if device.type != "cpu" or dtype not in NAMES or library().handle is not None:
        return None
    return f"no compiled passes: {library().reason}"


@functools.cache
def library() -> Native:
    """Compile (once per machine) and load the native passes, by the first compiler that can.

    Warns where none can: every result is the same then, but later.
    """
    found = Native(None, f"no C compiler ({', '.join(_COMPILERS)}) is on the PATH")
    for compiler in _compilers():
        found = _made_by(compiler)
        if found.handle is not None:
            break
    if found.handle is None:
        warnings.warn(
            f"CPU operations run as plain torch, slower than by compiled passes: {found.reason}",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def _compilers() -> Iterator[str]:
    """Their paths, each once: `cc` is most often a link to one of the others."""
    seen = set()
    for path in map(shutil.which, _COMPILERS):
        if path is not None and os.path.realpath(path) not in seen:
            seen.add(os.path.realpath(path))
            yield path


def _made_by(compiler: str) -> Native:
    try:
        handle, why_not_kept = _loaded(compiler)
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or ["it did not say why"]
        return Native(None, f"{compiler} failed: {said[-1]}")
    except OSError as error:
        return Native(None, f"what {compiler} makes could not be kept or loaded: {error}")
    for name, signature in _signatures(handle):
        function = getattr(handle, name)
        function.restype = None
        function.argtypes = [_TYPES[word] for word in signature.split()]
    kept = f" for this process alone: {why_not_kept}" if why_not_kept else ""
    return Native(handle, f"compiled by {compiler}{kept}")


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
_UNITS = f"factor flag {_MASK}"
_ROWS = "pointer size"
_FACTOR = "pointer size size flag"


@functools.cache
def has(handle: ctypes.CDLL, passes: str) -> bool:
    """Whether the compiler knew the processor's instructions for some passes.

    They are `attention`, `bf16_rows` (those over few rows of bf16), `bf16_product`,
    `int8_product` and `thin_product`.
    """
    return bool(ctypes.c_int.in_dll(handle, f"artemis_has_{passes}").value)


def over_bf16(passes: str) -> ctypes.CDLL | None:
    """The library, where it has passes by bf16 dot products and nothing here is faster."""
    handle = library().handle if has_bf16_dots() else None
    return handle if handle is not None and has(handle, passes) else None


def _signatures(handle: ctypes.CDLL) -> Iterator[tuple[str, str]]:
    """Name and argument types of every pass."""
    sizes = "size size size"
    for dtype in NAMES.values():
        yield f"artemis_dropout_{dtype}", f"pointer pointer size {_MASK} flag threads"
        yield f"artemis_shrink_{dtype}", f"pointer pointer pointer {sizes} {_MASK} threads"
        yield (
            f"artemis_units_forward_{dtype}",
            f"pointer size pointer {sizes} {_UNITS} threads",
        )
        yield (
            f"artemis_units_backward_{dtype}",
            f"pointer size pointer pointer size pointer pointer {sizes} factor {_UNITS} threads",
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
        yield f"artemis_rms_norm_forward_{dtype}", f"{'pointer ' * 3}size size factor threads"
        yield f"artemis_rms_norm_backward_{dtype}", f"{'pointer ' * 5}size size factor threads"
        yield f"artemis_gated_forward_{dtype}", "pointer pointer pointer size flag threads"
        yield f"artemis_gated_backward_{dtype}", f"{'pointer ' * 5}size flag threads"
        yield (
            f"artemis_rotary_{dtype}",
            f"pointer {sizes} pointer pointer pointer {sizes} {sizes} size size flag threads",
        )
        scores = f"{sizes} size size pointer size size flag factor threads"
        yield f"artemis_softmax_forward_{dtype}", f"pointer pointer {scores}"
        yield f"artemis_softmax_backward_{dtype}", f"pointer pointer pointer {scores}"
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
    if has(handle, "bf16_product"):
        yield (
            "artemis_bf16_product",
            f"{'pointer ' * 4}size pointer size size flag size factor pointer {sizes}"
            " flag flag threads",
        )
    if has(handle, "attention"):
        heads = "pointer size size size"
        of = f"{'size ' * 7}pointer size size flag factor threads"
        for queries in ("forward", "few"):
            yield f"artemis_attention_{queries}", f"{heads} {heads} {heads} pointer pointer {of}"
        yield (
            "artemis_attention_backward",
            f"{heads} {heads} {heads} {heads} {'pointer ' * 4}{of}",
        )
    if has(handle, "thin_product"):
        yield (
            "artemis_thin_product",
            f"{_FACTOR} {_FACTOR} {_ROWS} pointer factor pointer size pointer flag {sizes} threads",
        )
        yield (
            "artemis_bottleneck_forward",
            f"{_ROWS} {_FACTOR} pointer {_ROWS} {_ROWS} {sizes} factor {_UNITS} threads",
        )
        yield (
            "artemis_bottleneck_backward",
            f"{_ROWS} {_FACTOR} pointer {_ROWS} {_ROWS} {'pointer ' * 4}{sizes} factor"
            f" {_UNITS} threads",
        )
        yield (
            "artemis_low_rank_backward",
            f"{_ROWS} {_FACTOR} {_ROWS} {_ROWS} pointer pointer {sizes} factor factor threads",
        )
    yield (
        "artemis_few_rows",
        f"pointer pointer pointer pointer pointer {sizes} size flag threads",
    )
    if has(handle, "bf16_rows"):
        yield (
            "artemis_few_rows_bf16",
            f"pointer pointer pointer pointer pointer pointer size {sizes} size flag threads",
        )
        yield (
            "artemis_frozen_bf16",
            f"{'pointer ' * 9}{sizes} size size factor flag flag flag threads",
        )


def _loaded(compiler: str) -> tuple[ctypes.CDLL, str]:
    """The library, compiled now unless an earlier run did, and why it is not kept, if it is not."""
    target = None
    if (folder := cache_folder()) is not None:
        target = folder / f"native-{_fingerprint(compiler)}.so"
        try:
            return ctypes.CDLL(str(target)), ""
        except OSError:  # damaged, or not there
            pass
    scratch, why_not_kept = _scratch(folder)
    with scratch as path:
        built = _built(compiler, Path(path))
        if why_not_kept:  # once loaded, it needs no file
            return ctypes.CDLL(str(built)), why_not_kept
        with built.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(built, target)
    return ctypes.CDLL(str(target)), ""


def _scratch(folder: Path | None) -> tuple[tempfile.TemporaryDirectory, str]:
    """A folder to compile in, in `folder` where that can be written, and why it is elsewhere."""
    if folder is None:
        return tempfile.TemporaryDirectory(), "the user has no home folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=folder), ""
    except OSError as error:
        return tempfile.TemporaryDirectory(), f"{folder} cannot be written ({error.strerror})"


def _built(compiler: str, scratch: Path) -> Path:
    """Path of a shared library in `scratch`.

    Compiled with OpenMP but linked without it: the runtime torch has loaded serves both, where a
    second one would fight it for the cores. That it serves shows with the first source.
    """
    objects: list[str] = []
    for source in sorted(_FOLDER.glob("*.c"), key=lambda source: (source.name != _FIRST, source)):
        objects.append(str(scratch / f"{source.stem}.o"))
        _run(compiler, *_FLAGS, "-c", str(source), "-o", objects[-1])
        if len(objects) == 1:
            ctypes.CDLL(str(_linked(compiler, objects, scratch / "first.so")))
    return _linked(compiler, objects, scratch / "native.so")


def _linked(compiler: str, objects: list[str], to: Path) -> Path:
    _run(compiler, "-shared", *objects, "-o", str(to), "-lm")
    return to


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _fingerprint(compiler: str) -> str:
    """Names what the machine code depends on: source, flags, compiler, processor."""
    version = _run(compiler, "--version")
    cpu = torch.backends.cpu.get_cpu_capability() + str(sorted(processor_flags()))
    sources = (file.read_bytes() for file in sorted(_FOLDER.glob("*.[ch]")))
    parts = (*sources, *(text.encode() for text in (" ".join(_FLAGS), version, cpu)))
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
