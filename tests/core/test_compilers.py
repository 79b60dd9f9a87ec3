"""Candidates compiled by processes of their own: what they answer, and what is left of them."""

import subprocess

import pytest
import torch

from artemis_kernels.core.device import CHIPS, has_triton
from artemis_kernels.core.tiling import Config, Shape, heuristic
from artemis_kernels.tuner import compilers

HOPPER = CHIPS["sm_90"]
SHAPE = Shape(64, k=64, r=16, dtype=torch.float16)
USUAL = heuristic("shrink", SHAPE, HOPPER)


@pytest.fixture
def processes(monkeypatch):
    """All that are started."""
    found, start = [], subprocess.Popen

    def started(*given, **how):
        found.append(start(*given, **how))
        return found[-1]

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # read where a kernel is decorated
    monkeypatch.setattr(compilers.subprocess, "Popen", started)
    return found


@pytest.mark.skipif(not has_triton(), reason="needs triton")
def test_what_is_compiled_elsewhere_is_told_and_what_is_not_too(processes, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    no_dot = Config(block_m=USUAL.block_m, block_k=8, block_r=16)
    with compilers.side_by_side(HOPPER, 1) as (compile_one, mapped):
        made = list(mapped(lambda config: compile_one("shrink", SHAPE, config), [USUAL, no_dot]))
    (shared, stack, columns), none = made
    assert 0 < shared <= HOPPER.shared_bytes and stack == columns == 0
    assert none is None
    assert list(tmp_path.rglob("*.cubin"))  # where a launch looks for it
    assert len(processes) == 1 and processes[0].poll() is not None


def test_a_compiler_that_dies_is_no_missing_answer(processes, monkeypatch):
    monkeypatch.setattr(compilers, "_PROGRAM", "")
    with (
        pytest.raises((RuntimeError, BrokenPipeError)),
        compilers.side_by_side(HOPPER, 2) as (compile_one, mapped),
    ):
        list(mapped(lambda config: compile_one("shrink", SHAPE, config), [USUAL]))
    assert all(process.poll() is not None for process in processes)
