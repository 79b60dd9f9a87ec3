"""Freed memory that is kept: the next allocation meets no page faults."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from artemis.training import memory

_MEASURE = """
import resource, sys, torch
from artemis.training import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
sizes = (1 << 22, 1 << 25, 1 << 27)  # bytes, also beyond what malloc would learn to keep
def use():
    for size in sizes:
        torch.empty(size, dtype=torch.uint8).fill_(1)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
rounds = []
for _ in range(5):
    before = faults()
    use()
    rounds.append(faults() - before)
print(min(rounds))
"""


def faults(mode: str) -> int:
    """Of a process with this C library's own malloc, as it is where nothing tunes it."""
    tuned = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(tuned)}
    command = [sys.executable, "-c", _MEASURE, mode]
    finished = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(finished.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_freed_memory_is_not_faulted_in_again():
    kept, given_back = faults("keep"), faults("as it comes")
    assert kept < 16
    assert given_back > 48  # huge pages at the fewest


@pytest.mark.parametrize(
    "library",
    [SimpleNamespace(), SimpleNamespace(mallopt=lambda name, value: int(name == -1))],
    ids=["no mallopt", "mallopt refuses"],
)
def test_another_c_library_is_left_alone(monkeypatch, library):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert memory.keep_freed_memory() is False


def test_where_there_is_no_posix(monkeypatch):
    monkeypatch.setattr(memory, "os", SimpleNamespace(name="nt"))
    monkeypatch.setattr(ctypes, "CDLL", None)  # not asked: it knows no whole process there
    assert memory.keep_freed_memory() is False
