"""What the search for tiles reads from compiled kernels: a configuration that spills is seen."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_a_spill_is_seen():
    """128 × 256 fp32 numbers take all 256 registers of each of 128 threads."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (usual_shared, usual_stack), (large_shared, large_stack) = json.loads(result.stdout)
    assert usual_stack == 0 < large_stack
    assert 0 < usual_shared < large_shared
