"""`make gpu` where there is no GPU: the same script at tiny sizes through the interpreter."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from artemis.benchmark.steps import Step, prepare
from bench.gpu import __main__ as script
from bench.gpu import models, tuning
from bench.gpu.__main__ import SECTIONS
from bench.gpu.accuracy import STRATEGIES

ROOT = Path(__file__).resolve().parents[2]


def test_every_section_runs_and_leaves_its_rows(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--tiny", "--out", tmp_path]
    command += ["--minutes", "60"]
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
    assert len(products) == 8  # what was rehearsed left no rows
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


def test_rows_of_a_stopped_process_are_read_up_to_where_it_stopped(tmp_path):
    rows = [{"run": "a", "kind": "product"}, {"run": "b", "kind": "product"}]
    text = "\n".join(json.dumps(row) for row in rows) + '\n{"run": "a", "ki'
    (tmp_path / "gpu_products.jsonl").write_text(text)
    assert script._rows(tmp_path, "products", "a") == rows[:1]


def test_an_arm_that_fails_leaves_the_others(monkeypatch):
    def prepared(workload, arm, cell):
        if arm == "hybrid":
            raise torch.OutOfMemoryError("too large")
        return prepare(Step("train", "full-bf16", cell))

    monkeypatch.setattr(models, "_prepared", prepared)
    rows = list(models.models(torch.device("cpu"), tiny=True, rounds=1))
    failed = [row["arm"] for row in rows if row.get("passed") is False]
    assert failed == ["hybrid", "hybrid"] and len(rows) > 4
    assert all("ms" in row or "too large" in row["where"] for row in rows)


def test_tuned_entries_come_as_they_are_written(tmp_path):
    entry = {"chosen": "a", "usual": "b", "rounds": 1, "ms": {}}
    table, seen = tmp_path / "chip.json", set()
    table.write_text(json.dumps({"strategies": {}, "tiles": {"one": entry}}))
    assert [row["key"] for row in tuning._new(tmp_path, seen, "op")] == ["one"]
    table.write_text(json.dumps({"strategies": {"one": entry}, "tiles": {"one": entry}}))
    assert [row["part"] for row in tuning._new(tmp_path, seen, "op")] == ["strategies"]
