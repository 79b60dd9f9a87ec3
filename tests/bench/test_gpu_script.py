"""`make gpu` where there is no GPU: the same script at tiny sizes through the interpreter."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from bench.gpu.__main__ import SECTIONS
from bench.gpu.accuracy import STRATEGIES

ROOT = Path(__file__).resolve().parents[2]


def test_every_section_runs_and_leaves_its_rows(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--tiny", "--out", tmp_path]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # torch.compile's peer then runs as it is written
    }
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = {
        name: [json.loads(line) for line in (tmp_path / f"gpu_{name}.jsonl").open()]
        for name in SECTIONS
    }
    for name, rows in found.items():
        assert rows[0]["kind"] == "run" and rows[0]["versions"]["torch"] == version("torch")
        assert rows[-1] == {"kind": "end", "run": rows[0]["run"], "state": "passed"}, name
    checked = {(row["op"], row["strategy"]) for row in found["accuracy"] if "op" in row}
    assert checked == {(name, strategy) for name, every in STRATEGIES.items() for strategy in every}
    products = found["products"][1:-1]
    ways = ("pointers", "descriptors", "vendor, then update")
    assert {row["provider"] for row in products} == {"bare", *(f"artemis, {way}" for way in ways)}
    assert all(row["passed"] and row["over_pointers"] > 0 for row in products)
    kernels = [row for row in found["kernels"] if row["kind"] == "kernel"]
    assert {row["impl"] for row in kernels if row["provider"] == "artemis"} == {"triton"}
    providers = {row["provider"] for row in kernels}
    assert {"artemis", "artemis/vendor", "artemis, int8", "plain", "addmm", "bare"} <= providers
    assert all(row["passed"] and row["over_floor"] > 0 for row in kernels)
    assert any(row.get("of_copy", 0) > 0 for row in kernels)
    groups = [row for row in found["groups"] if row["kind"] == "group"]
    assert {row["members"] for row in groups} == {"lora", "bottleneck"}
    assert all(row["passed"] and row["over_joined"] > 0 for row in groups)
    losses = {row["provider"]: row for row in found["groups"] if row["kind"] == "loss"}
    assert losses.keys() == {"artemis", "torch"} and losses["artemis"]["passed"]
    packed = [row for row in found["packed"] if row["kind"] == "packed"]
    assert {"bare", *(f"artemis, {f}" for f in ("int8", "fp8", "int4"))} <= {
        row["provider"] for row in packed
    }
    assert all(row["passed"] and row["over_bare"] > 0 for row in packed)
    tuned = found["tuning"][1:-1]
    assert {row["part"] for row in tuned} == {"strategies"}  # on a GPU tiles too
    kinds = {row["op"].partition(":")[0] for row in tuned}
    assert kinds == {"adapter_linear", "quantized_linear", "frozen_linear"}
    assert any(" int8:auto" in row["key"] for row in tuned)
    for kind in ("train", "decode"):
        arms = {row["arm"] for row in found["models"] if row["kind"] == kind}
        assert {"full-bf16", "hybrid", "hybrid-int8"} <= arms
    assert len(list(tmp_path.iterdir())) <= 8
    assert "failed" not in (tmp_path / "gpu_summary.md").read_text().partition("## ")[0]
