"""What the search for tiles reads from compiled kernels: a configuration that spills is seen."""

import json
import os
import subprocess
import sys
from pathlib import Path

from artemis_kernels.core.device import CHIPS

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, torch
from dataclasses import replace
from artemis_kernels.core import tiling
from artemis_kernels.core.device import CHIPS
from artemis_kernels.core.tiling import Shape
from artemis_kernels.tuner.tiles import compiled_resources
chip, shape = CHIPS["sm_90"], Shape(8192, 4096, r=16)
usual = tiling.heuristic("update", shape, chip)
large = replace(usual, block_m=128, block_n=256, warps=4)
found = [compiled_resources("update", shape, config, chip) for config in (usual, large)]
print(json.dumps(found))
"""
PACKED = """
import json
from artemis_kernels.core import tiling
from artemis_kernels.core.device import CHIPS
from artemis_kernels.core.tiling import Shape
from artemis_kernels.tuner.tiles import compiled_resources, staged_bytes
chip, found = CHIPS["sm_90"], {}
for kernel, shape in {
    "weight_only_int8": Shape(16, 4096, 4096, 16),
    "weight_only_int4": Shape(16, 4096, 4096, 16),
    "eight_bit_int8": Shape(8192, 4096, 4096, 16, masked=True),
    "eight_bit_fp8": Shape(8192, 4096, 4096, 16),
    "round_rows_int8": Shape(8192, 4096),
    "finish_product_int8": Shape(8192, 4096, r=16),
    "unpack_fp8": Shape(1, 4096, 4096),
    "transpose_fp8": Shape(1, 4096, 11008),
    "transpose_int8": Shape(1, 4097, 4097),
    "weight_gradients": Shape(8192, k=4096, r=64),
}.items():
    usual = tiling.heuristic(kernel, shape, chip)
    found[kernel] = compiled_resources(kernel, shape, usual, chip)
    assert staged_bytes(kernel, shape, usual) <= chip.shared_bytes
print(json.dumps(found))
"""
SMALLEST = """
import json, torch
from artemis_kernels.core import tiling
from artemis_kernels.core.device import CHIPS
from artemis_kernels.core.tiling import Shape
from artemis_kernels.tuner.tiles import compiled_resources, neighbours
chip, found = CHIPS["sm_90"], {}
shape = Shape(16, 50257, 768, 16, torch.float32)
for kernel in ("expand", "weight_only_int8", "weight_only_int4", "eight_bit_int8", "eight_bit_fp8"):
    usual = tiling.heuristic(kernel, shape, chip)
    smallest = min(neighbours(kernel, usual), key=lambda c: (c.block_m, c.block_n, c.block_k))
    found[kernel] = compiled_resources(kernel, shape, smallest, chip)
print(json.dumps(found))
"""
TENSOR_MEMORY = """
import json
from artemis_kernels.core.device import CHIPS
from artemis_kernels.core.tiling import Config, Shape
from artemis_kernels.tuner.tiles import compiled_resources
shape, chip = Shape(8192, 4096, 4096, 64), CHIPS["sm_100"]
found = {n: compiled_resources("one_pass", shape, Config(128, n, 64, warps=8, stages=2), chip)
         for n in (128, 256)}
print(json.dumps(found))
"""


def compiled_by(program: str):
    """What a program prints as JSON in a process that compiles kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_kernels_over_packed_weights_are_read_too():
    """Every family, launched on stand-ins of its operands; no default is pruned."""
    for kernel, (shared, stack, _) in compiled_by(PACKED).items():
        assert stack == 0 and shared <= CHIPS["sm_90"].shared_bytes, kernel


def test_the_smallest_tiles_compile():
    """Half of each of the defaults for an odd fp32 layer: no dot is asked for too few numbers."""
    for kernel, (shared, stack, _) in compiled_by(SMALLEST).items():
        assert stack == 0 and shared <= CHIPS["sm_90"].shared_bytes, kernel


def test_a_spill_is_seen():
    """128 × 256 fp32 numbers take all 256 registers of each of 128 threads."""
    (usual_shared, usual_stack, _), (large_shared, large_stack, _) = compiled_by(PROGRAM)
    assert usual_stack == 0 < large_stack
    assert 0 < usual_shared < large_shared


def test_tensor_memory_is_seen():
    """A column holds 128 fp32 numbers: beside an accumulator of 128 × 256, S takes the 513th."""
    found = compiled_by(TENSOR_MEMORY)
    assert 0 < found["128"][2] <= 512 < found["256"][2]
