"""Every operation launched through Triton's real CUDA driver, over a libcuda that runs nothing.

What this shows, and compiling alone does not: arguments that the launcher takes, grids and shared
memory that a driver accepts, tensor maps that it encodes.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "_shrink", "_expand", "_update", "_expand_backward", "_shrink_backward", "_sum_parts",
    "_weight_gradients", "_sum_gradients", "_eight_bit", "_round_rows", "_transpose",
    "_weight_only", "_one_pass", "_expand_persistent", "_matvec", "_shrink_rows", "_forward",
    "_backward", "_rotary",
}  # fmt: skip
NVIDIA = importlib.util.find_spec("triton") and importlib.util.find_spec("triton.backends.nvidia")


@pytest.mark.skipif(not NVIDIA, reason="needs triton with its backend for NVIDIA")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_every_operation_is_launched(tmp_path):
    library, log = tmp_path / "libcuda.so.1", tmp_path / "launched"
    headers = Path(NVIDIA.submodule_search_locations[0], "include")
    command = ["gcc", "-shared", "-fPIC", "-I", headers, "tests/aot/libcuda.c", "-o", library]
    subprocess.run(command, cwd=ROOT, check=True)
    shutil.copy(library, tmp_path / "libcuda.so")  # by which Triton links
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_LIBCUDA_PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": "",
        "LAUNCHED": str(log),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.aot.launches"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert set(log.read_text().split()) >= KERNELS
