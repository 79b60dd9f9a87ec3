"""Compiled kernels, read without a GPU: no spills, shared memory that fits, the right instructions.

Compiled in a process of its own, since this one interprets kernels and Triton cannot do both.
"""

import functools
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from artemis_kernels.core.device import CHIPS
from tests.aot.budget import BUDGET, TARGETS
from tests.aot.cases import CASES

ROOT = Path(__file__).parents[2]
TRAINING_INSTRUCTION = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma",
    "sm_100": "tcgen05",
    "gfx942": "mfma",
}
TENSOR_CORES = {"mma.sync", "wgmma", "tcgen05", "mfma"}
CASE = {case.name: case for case in CASES}
NO_PRODUCT = (
    "_finish", "_sum_parts", "_sum_gradients", "_unpack", "_transpose", "_round_rows",
    "_round_logits", "_column_max", "_set_apart", "_weights_apart", "_forward", "_backward",
    "_matvec", "_shrink_rows", "_rotary",
)  # fmt: skip


@functools.cache
def measured(chip: str) -> dict[str, dict]:
    """What the kernels compile to for a chip, measured once."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.aot.budget", "--chip", chip]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])[chip]


def offenders(chip: str, wrong) -> list[str]:
    """Names of the kernels for which `wrong(case, kernel, measurement)` holds."""
    return [
        f"{name}: {one}"
        for name, one in measured(chip).items()
        if wrong(CASE[name.split(" / ")[0]], name.split(" / ")[1], one)
    ]


@pytest.mark.parametrize("chip", TARGETS)
def test_nothing_spills(chip):
    # Triton 3.6 gives a few kernels a word of stack that they do not spill to.
    allowed = 0 if version("triton") in json.loads(BUDGET.read_text()) else 8
    assert not offenders(chip, lambda case, kernel, one: one["stack"] > allowed)


@pytest.mark.parametrize("chip", TARGETS)
def test_shared_and_tensor_memory_fit(chip):
    """A kernel that compiles may still be refused at launch."""
    limit = CHIPS[chip].shared_bytes
    assert not offenders(
        chip, lambda case, kernel, one: one["shared"] > limit or one["columns"] > 512
    )
    assert (chip == "sm_100") == any(one["columns"] for one in measured(chip).values())


@pytest.mark.parametrize("chip", TARGETS)
def test_products_use_tensor_cores(chip):
    def misses(case, kernel, one):
        if case.fp32 or kernel in NO_PRODUCT:
            return False
        used = TENSOR_CORES & one["instructions"].keys()
        return TRAINING_INSTRUCTION[chip] not in used if case.training else not used

    assert not offenders(chip, misses)


@pytest.mark.parametrize("chip", TARGETS)
def test_8_bit_products_are_multiplied_in_8_bits(chip):
    """Not converted on the way, which would compile as well and be half as fast."""

    def misses(case, kernel, one):
        return case.eight_bit and kernel == "_eight_bit" and "8 bit" not in one["instructions"]

    assert not offenders(chip, misses)
    assert any(CASE[name.split(" / ")[0]].eight_bit for name in measured(chip))


@pytest.mark.parametrize("chip", TARGETS)
def test_fp32_is_never_tf32(chip):
    """The interpreter cannot show this: it multiplies in full precision whatever is asked."""
    assert not offenders(chip, lambda case, kernel, one: "tf32" in one["instructions"])
    assert any(CASE[name.split(" / ")[0]].fp32 for name in measured(chip))


@pytest.mark.parametrize("chip", TARGETS)
def test_loads_are_vectors(chip):
    vectors = {"vector load", "TMA"}
    assert not offenders(chip, lambda case, kernel, one: not vectors & one["instructions"].keys())


@pytest.mark.parametrize("chip", ["sm_90", "sm_100"])
def test_descriptors_become_tma(chip):
    assert not offenders(
        chip,
        lambda case, kernel, one: (
            kernel == "_expand_persistent" and "TMA" not in one["instructions"]
        ),
    )


@pytest.mark.parametrize("chip", TARGETS)
def test_within_the_budget(chip):
    """Registers and shared memory stay under the golden bounds of this Triton's version."""
    budget = json.loads(BUDGET.read_text())
    installed = version("triton")
    if installed not in budget:
        pytest.skip(f"no budget for triton {installed}: python -m tests.aot.budget --write")
    golden = {
        name: [int(number) for number in re.findall(r"\d+", line)]
        for name, line in budget[installed][chip].items()
    }
    assert golden.keys() == measured(chip).keys(), "cases changed: make budget, and read the diff"
    over = {
        name: f"{one['registers']} registers, {one['shared']} bytes shared; allowed {golden[name]}"
        for name, one in measured(chip).items()
        if one["registers"] > golden[name][0] or one["shared"] > golden[name][1]
    }
    assert not over
