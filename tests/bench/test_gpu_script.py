"""`make gpu` where there is no GPU: the same script at tiny sizes through the interpreter."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from artemis.benchmark import machine
from artemis.benchmark.records import append, read
from bench import report
from bench.gpu import __main__ as script
from bench.gpu.__main__ import SECTIONS
from bench.gpu.accuracy import STRATEGIES
from bench.gpu.frozen import BASES

ROOT = Path(__file__).resolve().parents[2]
MACHINERY = {
    "compiled by Inductor", "two runs, bit by bit", "fp32", "fresh masks of a graph",
    "as CUDA graphs", "dX of an int8 head", "rows",
}  # fmt: skip
BETWEEN = {"rms_norm", "gated_activation", "rotary_embedding"}
FROZEN = [("frozen_linear", f"{of} over {base}") for of in ("lora", "bottleneck") for base in BASES]


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
    header, *every = read(tmp_path / "gpu.jsonl")
    assert header["kind"] == "run" and header["versions"]["torch"] == version("torch")
    assert header["code"] == machine.code_hash(ROOT) and header["sections"] == list(SECTIONS)
    found = {name: [row for row in every if row["section"] == name] for name in SECTIONS}
    for name, rows in found.items():
        end = {"kind": "end", "run": header["run"], "section": name, "state": "passed"}
        assert rows.pop() == end, name
    checked = {(row["op"], row["strategy"]) for row in found["accuracy"] if "op" in row}
    forced = {(name, strategy) for name, every in STRATEGIES.items() for strategy in every}
    assert checked >= forced | set(FROZEN)
    assert {way for _, way in checked - forced - set(FROZEN)} == MACHINERY
    products = found["products"]
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
    between = [row for row in found["groups"] if row["kind"] == "between"]
    assert {(row["op"], row["pass"]) for row in between} == {
        (op, which) for op in BETWEEN for which in ("forward", "both")
    }
    assert all(row.get("passed", True) and row["of_copy"] > 0 for row in between)
    assert {row["op"] for row in found["accuracy"] if row["strategy"] == "rows"} == BETWEEN
    packed = [row for row in found["packed"] if row["kind"] == "packed"]
    assert {"bare", *(f"artemis, {f}" for f in ("int8", "fp8", "int4"))} <= {
        row["provider"] for row in packed
    }
    assert all(row["passed"] and row["over_bare"] > 0 for row in packed)
    tuned = found["tuning"]
    assert {row["part"] for row in tuned} == {"strategies"}  # on a GPU tiles too
    kinds = {row["op"].partition(":")[0] for row in tuned}
    assert kinds == {"adapter_linear", "quantized_linear", "frozen_linear"}
    assert any(" int8:auto" in row["key"] for row in tuned)
    for kind in ("train", "decode"):
        arms = {row["arm"] for row in found["models"] if row["kind"] == kind}
        assert {"full-bf16", "hybrid", "hybrid-int8"} <= arms
    adapted = [row for row in found["models"] if row.get("arm", "").startswith(("peft", "hybrid"))]
    assert all(row["error"] <= 1 and row["speedup"]["full-bf16"]["p50"] > 0 for row in adapted)
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.jsonl", "gpu_summary.md"}
    said = (tmp_path / "gpu_summary.md").read_text().partition("## ")[0]
    assert "failed" not in said and f"code {header['code']}" in said
    check_that_documents_are_as_before([header, *every])


def check_that_documents_are_as_before(rows: list[dict]):
    """All results are read together: a GPU's rows are none of any table that is there."""
    document = "\n".join(f"<!-- begin: {n} -->\n<!-- end: {n} -->" for n in report.SECTIONS)
    known = [row for path in sorted(report.RESULTS.glob("*.jsonl")) for row in read(path)]
    assert report.filled(document, known + rows) == report.filled(document, known)


def test_rows_of_a_stopped_process_are_read_up_to_where_it_stopped(tmp_path):
    rows = [{"run": run, "section": "products", "kind": "product"} for run in "ab"]
    text = "\n".join(json.dumps(row) for row in rows) + '\n{"run": "a", "ki'
    (tmp_path / "gpu.jsonl").write_text(text)
    assert script._rows(tmp_path, "products", "a") == rows[:1]


def run_of(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-S", "-c", code, *arguments])


def until(happened: Callable[[], bool]) -> None:
    """Wait for it, for as long as the slowest machine may take."""
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_wrong_row_fails_the_run_though_its_section_was_stopped(tmp_path, monkeypatch):
    row = {
        "kind": "accuracy", "op": "lora_linear", "strategy": "split", "dtype": "bfloat16",
        "sizes": {"m": 1}, "dropout": 0.0, "ratio": 2.0, "where": "y", "passed": False,
    }  # fmt: skip
    code = "import sys, time; open(sys.argv[1], 'a').write(sys.argv[2]); time.sleep(600)"

    def start(options, section, parts, run, *more):
        path = tmp_path / "gpu.jsonl"
        line = json.dumps(row | {"run": run, "section": section}) + "\n"
        process = run_of(code, path, line)
        until(lambda: '"ratio"' in path.read_text())
        return [process]

    monkeypatch.setattr(script, "_start", start)
    monkeypatch.setattr(script, "_rehearsals", lambda options, run: [])
    monkeypatch.setattr(script, "SECTIONS", {"accuracy": (("",), 1.0)})
    options = ["--device", "cpu", "--tiny", "--minutes", "1e-6", "--out", str(tmp_path)]
    assert script.main(options) == 1
    assert "- accuracy: failed" in (tmp_path / "gpu_summary.md").read_text()


def test_a_process_that_died_is_seen_beside_one_that_was_stopped():
    slow = "import time; time.sleep(600)"
    died, done = run_of("import os; os.kill(os.getpid(), 9)"), run_of("")
    for process in (died, done):
        process.wait(120)
    assert script._wait([run_of(slow), died], time.monotonic() + 0.1) == "failed"
    assert script._wait([run_of(slow), done], time.monotonic() + 0.1) == "out of time"
    assert script._wait([run_of("")], time.monotonic() + 120) == "passed"


@pytest.mark.parametrize(
    ("ended", "verdicts", "state"),
    [
        ("passed", {"artemis": True, "peft": False}, "passed"),
        ("passed", {"artemis": True, "artemis, int8": None}, "incomplete"),
        ("out of time", {"artemis": None}, "out of time"),
        ("out of time", {"artemis": None, "artemis, int8": False}, "failed"),
        ("failed", {"artemis": True}, "failed"),
    ],
)
def test_how_a_section_ended(ended, verdicts, state):
    rows = [{"provider": name, "passed": passed} for name, passed in verdicts.items()]
    assert script._state(ended, [{"kind": "peaks"}, *rows]) == state


def test_some_sections_share_all_the_time(tmp_path):
    given = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--minutes", "10"]
    few = script._parse([*given, "--sections", "models,accuracy"])
    deadlines = script._deadlines(few, start=100.0)
    assert list(deadlines) == ["accuracy", "models"] and deadlines["models"] == 700.0
    assert 100.0 < deadlines["accuracy"] < 700.0
    every = script._deadlines(script._parse(given), start=0.0)
    assert list(every) == list(SECTIONS) and list(every.values()) == sorted(every.values())
    assert every["models"] == pytest.approx(600.0)


def test_an_unknown_section_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        script._parse(["--device", "cpu", "--tiny", "--out", str(tmp_path), "--sections", "speed"])
    assert "got 'speed', allowed: accuracy, products," in capsys.readouterr().err


def test_tiny_sizes_are_for_a_gpu_too(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    started = []
    monkeypatch.setattr(script.subprocess, "Popen", lambda command, **how: started.append(command))
    options = script._parse(["--tiny", "--out", str(tmp_path), "--sections", "products"])
    script._start(options, "products", ("",), "a")
    ((*command,),) = started
    inner = [str(word) for word in command[3:]]
    again = script._parse(inner)
    assert again.tiny and again.device == "cuda" and again.section == "products"


@pytest.mark.parametrize("passed", [True, False, None])
def test_nothing_is_timed_where_no_kernel_is_accurate(tmp_path, monkeypatch, capsys, passed):
    row = {
        "kind": "accuracy", "op": "lora_linear", "strategy": "split", "dtype": "bfloat16",
        "sizes": {"m": 1}, "dropout": 0.0, "ratio": None, "where": "y", "passed": passed,
    }  # fmt: skip
    started = []

    def start(options, section, parts, run, *more):
        started.append(section)
        if section == "accuracy":
            append(tmp_path / "gpu.jsonl", [row | {"run": run, "section": section}])
        return []

    monkeypatch.setattr(script, "_start", start)
    monkeypatch.setattr(script, "_rehearsals", lambda options, run: [])
    options = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--sections", "accuracy,models"]
    assert script.main(options) == (0 if passed else 1)
    assert started == ["accuracy", "models"][: 2 if passed else 1]
    said = "models: left out, since no kernel is accurate"
    assert (said in capsys.readouterr().out) is not passed or passed is None
    assert (f"- {said}" in (tmp_path / "gpu_summary.md").read_text()) is (not passed)


@pytest.mark.parametrize("rehearse", [True, False])
def test_a_rehearsal_leaves_memory_to_what_is_proved_beside_it(monkeypatch, rehearse):
    shares = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    monkeypatch.setattr(script, "rows_of", lambda *given: iter(()))
    monkeypatch.setattr(script.os, "nice", lambda more: None)
    given = {"device": "cuda", "tiny": False, "section": "", "part": "", "run": "a"}
    options = argparse.Namespace(**given, rehearse=rehearse)
    script._run_section(options)
    beside = len(SECTIONS) - 1
    assert [beside * share < 0.75 for share in shares] == [True] * rehearse
