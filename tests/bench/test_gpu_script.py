"""`make gpu` where there is no GPU: the same script at tiny sizes through the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from bench.gpu_accuracy import STRATEGIES

ROOT = Path(__file__).resolve().parents[2]


def test_every_section_runs_and_leaves_its_rows(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--tiny", "--out", tmp_path]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = {
        name: [json.loads(line) for line in (tmp_path / f"gpu_{name}.jsonl").open()]
        for name in ("accuracy", "kernels", "packed", "training")
    }
    for name, rows in found.items():
        assert rows[0]["kind"] == "run" and rows[0]["versions"]["torch"] == torch.__version__
        assert rows[-1] == {"kind": "end", "run": rows[0]["run"], "state": "passed"}, name
    checked = {(row["op"], row["strategy"]) for row in found["accuracy"] if "op" in row}
    assert checked == {(name, strategy) for name, every in STRATEGIES.items() for strategy in every}
    kernels = [row for row in found["kernels"] if row["kind"] == "kernel"]
    assert {"artemis", "plain", "addmm", "bare"} <= {row["provider"] for row in kernels}
    assert all(row["passed"] and row["over_floor"] > 0 for row in kernels)
    packed = [row for row in found["packed"] if row["kind"] == "packed"]
    assert {"int8", "fp8", "int4", "16-bit bare"} <= {row["provider"] for row in packed}
    assert all(row["passed"] and row["over_bare"] > 0 for row in packed)
    assert {"full-autocast", "hybrid"} <= {row.get("arm") for row in found["training"]}
    assert "failed" not in (tmp_path / "gpu_summary.md").read_text().partition("## ")[0]
