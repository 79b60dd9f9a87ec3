"""What a measurement depends on: the processor, the versions, the state of the source."""

import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..version import __version__

_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "numpy", "torchao")
_DECISIVE_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")

#: What `allocator` of a run says of the malloc that its times were taken with.
KEEPS, AS_IT_COMES = "keeps freed memory", "as it comes"
#: Where a change makes another measurement: not in tests, documents and results.
_PLACES = ("artemis", "artemis_kernels", "bench")
_CODE = (*(f":/{place}" for place in _PLACES), ":(top,exclude)bench/results")
_CODE_FILES = (".py", ".c", ".h")


class Identity(NamedTuple):
    """Equal for two runs whose times may stand in one table."""

    processor: str
    threads: int
    gpu: str | None
    torch: str
    allocator: str


def facts(keeps_memory: bool = False) -> dict[str, Any]:
    """Machine, versions, commit and hash of the code, as plain values for a JSON line.

    `keeps_memory`: what is timed keeps what it frees (`artemis.training.keep_freed_memory`).
    """
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "allocator": KEEPS if keeps_memory else AS_IT_COMES,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "versions": versions(),
        **source(),
    }


def processor() -> dict[str, Any]:
    """Its name and generation, and its instruction sets that matrix products use.

    Virtual machines on unlike chips may call them all the same.
    """
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return {"name": platform.processor() or platform.machine(), "flags": []}
    fields = {}
    for line in information.read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    present = set(fields.get("flags", "").split())
    name = fields.get("model name", platform.machine())
    if {"cpu family", "model"} <= fields.keys():
        name += f", family {fields['cpu family']} model {fields['model']}"
    return {
        "name": name,
        "flags": [flag for flag in _DECISIVE_FLAGS if flag in present],
    }


def accelerator() -> dict[str, Any] | None:
    """The current GPU, its driver and the CUDA (or ROCm) version of torch; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties()
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": properties.name,
        "processors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "driver": (_output(*query) or "").partition("\n")[0] or None,
        "runtime": torch.version.cuda or torch.version.hip,
    }


def versions() -> dict[str, str]:
    """Python, Artemis, and the packages that take part."""
    found = {"python": platform.python_version(), "artemis": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def source() -> dict[str, Any]:
    """Commit, whether any code of the packages or of `bench` differs from it, or is new; its hash.

    Commit and difference are None where nothing is known: a package that is installed, or copied
    without git.
    """
    package, code = Path(__file__).resolve().parent.parent, code_hash()
    if _git("ls-files", "--error-unmatch", str(package / "__init__.py")) is None:
        return {"commit": None, "dirty": None, "code": code}
    changed = _git("status", "--porcelain", "--", *_CODE)
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(changed), "code": code}


def code_hash(root: Path | None = None) -> str:
    """A short hash of the code in `root`, names and contents: equal where the code is."""
    root = root or Path(__file__).resolve().parent.parent.parent
    found = hashlib.sha256()
    for path in sorted(path for name in _PLACES for path in (root / name).rglob("*")):
        if path.suffix in _CODE_FILES:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            found.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return found.hexdigest()[:12]


def identity(facts: dict[str, Any]) -> Identity:
    """What decides over times: chip, threads, torch and allocator (older facts name none)."""
    gpu = facts.get("gpu") or {}
    return Identity(
        facts["processor"]["name"],
        facts["threads"],
        gpu.get("name"),
        facts["versions"]["torch"],
        facts.get("allocator", AS_IT_COMES),
    )


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(Path(__file__).resolve().parent), *arguments)


def _output(*command: str) -> str | None:
    """What a program prints; None where it is missing or fails."""
    try:
        finished = subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return finished.stdout.strip()
