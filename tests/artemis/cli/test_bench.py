"""artemis bench at tiny sizes: what it prints, what it appends, what it does not measure twice."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from artemis.benchmark import worker
from artemis.benchmark.arms import ARMS, TRAINING, hybrid
from artemis.benchmark.flops import training_flops
from artemis.benchmark.models import architecture
from artemis.benchmark.steps import Step
from artemis.cli import main

TRAIN = [
    "bench", "train", "--models", "64x3", "--measure", "parts", "--tokens", "32",
    "--sequence", "16", "--rounds", "2", "--arms", "full-autocast", "hybrid",
]  # fmt: skip


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def of_first_run(path: Path) -> list[dict]:
    found = records(path)
    return [record for record in found if record["run"] == found[0]["run"]]


def written(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module", autouse=True)
def committed():
    """All runs are of one commit, whatever the state of this checkout."""
    source = {"commit": "c" * 40, "dirty": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("artemis.benchmark.machine.source", lambda: source)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, committed) -> Path:
    """The file that a first run leaves."""
    path = tmp_path_factory.mktemp("bench") / "train.jsonl"
    assert main([*TRAIN, "--json", str(path)]) == 0
    return path


def test_train_writes_what_its_row_is_made_of(trained):
    found = records(trained)
    head, rows = found[0], [record for record in found if record["kind"] == "row"]
    assert head["kind"] == "run" and head["processor"]["name"] and head["versions"]["torch"]
    assert all(record["run"] == head["run"] for record in found)
    assert {row["arm"] for row in rows} == {"full-autocast", "hybrid"}
    assert all("extrapolated from 1 and 2" in row["how"] for row in rows)
    hybrid = next(row for row in rows if row["arm"] == "hybrid")
    full = next(row for row in rows if row["arm"] == "full-autocast")
    assert hybrid["gate"]["passed"]
    assert hybrid["speedup"]["full-autocast"] == pytest.approx(
        full["ms"]["p50"] / hybrid["ms"]["p50"], abs=1e-3
    )
    relative = hybrid["ms"]["p50"] / full["ms"]["p50"]
    assert hybrid["device_seconds_relative"] == pytest.approx(relative, abs=1e-4)
    flops = [training_flops(row["arm"], architecture("64x3"), 2, 16) for row in (hybrid, full)]
    assert hybrid["flops_relative"] == pytest.approx(flops[0] / flops[1], abs=1e-4)
    assert hybrid["memory"]["states"] < full["memory"]["states"]
    times = {
        record["layers"]: sorted(record["ms"])
        for record in found
        if record["kind"] == "step" and record["arm"] == "hybrid" and record["workload"] == "train"
    }
    one, two = (sum(times[layers]) / 2 for layers in (1, 2))  # of two rounds: the median
    assert hybrid["ms"]["p50"] == pytest.approx(one + 2 * (two - one), abs=0.02)
    assert hybrid["samples_per_second"] == pytest.approx(2e3 / hybrid["ms"]["p50"], rel=1e-3)


def test_resuming_measures_nothing_twice(trained, capsys, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a process was started")

    monkeypatch.setattr("artemis.benchmark.jobs.lines", refuse)
    before = [r for r in records(trained) if r["kind"] == "row"]
    assert main([*TRAIN, "--resume", str(trained)]) == 0
    after = [r for r in records(trained) if r["kind"] == "row"][len(before) :]
    without_run = [[{**row, "run": None} for row in rows] for rows in (before, after)]
    assert without_run[0] == without_run[1]
    assert "hybrid, bf16 base" in capsys.readouterr().out
    assert all(r["kind"] in ("run", "row") for r in records(trained)[-3:])
    with pytest.raises(AssertionError, match="a process was started"):
        main([*TRAIN, "--rounds", "4", "--resume", str(trained)])


def test_results_of_another_commit_are_measured_anew(trained, tmp_path, capsys, monkeypatch):
    lines = of_first_run(trained)
    lines[0]["commit"] = "0" * 40
    path = written(tmp_path / "older.jsonl", lines)
    monkeypatch.setattr("artemis.benchmark.jobs.lines", worker.run)
    assert main([*TRAIN, "--resume", str(path)]) == 0
    warning = f"--resume: {path}: results left out: 8 (another commit)\n"
    assert warning in capsys.readouterr().err
    steps, again = (
        [Step.from_dict(record) for record in found if record["kind"] == "step"]
        for found in (lines, records(path)[len(lines) :])
    )
    assert len(steps) == 8 and set(steps) == set(again)


def test_a_file_of_another_machine_is_not_resumed(trained, tmp_path, capsys):
    lines = records(trained)
    lines[0]["processor"]["name"] = "Abacus"
    path = tmp_path / "other.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert main([*TRAIN, "--resume", str(path)]) == 1
    error = capsys.readouterr().err
    assert "was measured on Abacus" in error and error.count("\n") == 1


def test_times_with_another_allocator_are_measured_anew(trained, tmp_path, capsys, monkeypatch):
    """Only memory, which is measured without, is taken over from an older file."""
    lines = of_first_run(trained)
    assert lines[0]["allocator"] == "keeps freed memory"
    del lines[0]["allocator"]
    path = written(tmp_path / "older.jsonl", lines)
    monkeypatch.setattr("artemis.benchmark.jobs.lines", worker.run)
    assert main([*TRAIN, "--resume", str(path)]) == 0
    assert "results left out: 4 (another allocator)" in capsys.readouterr().err
    new = records(path)[len(lines) :]
    assert new[0]["kind"] == "run" and new[0]["allocator"] == "keeps freed memory"
    steps = [record for record in new if record["kind"] == "step"]
    assert {step["workload"] for step in steps} == {"train"} and len(steps) == 4
    first, again = (
        [record["ms"] for record in found if record["kind"] == "row"] for found in (lines, new)
    )
    assert first != again and len(first) == len(again)


@pytest.fixture
def traced(monkeypatch):
    """Compiled graphs run as torch's own operations, and in this process."""
    monkeypatch.setattr("artemis.training.compiling.can_compile", lambda device: True)
    monkeypatch.setattr("artemis.benchmark.jobs.lines", worker.run)
    monkeypatch.setattr(
        "artemis.benchmark.steps.compile_model",
        lambda model: model.compile(fullgraph=True, dynamic=False, backend="aot_eager"),
    )
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("traced")
def test_compiled_and_plain_results_share_a_file_and_no_ratio(trained, tmp_path, capsys):
    path = tmp_path / "both.jsonl"
    path.write_text(trained.read_text())
    before = len(records(path))
    assert main([*TRAIN, "--compile", "--resume", str(path)]) == 0
    assert "Every arm under `torch.compile`" in capsys.readouterr().out
    new = records(path)[before:]
    rows = {record["arm"]: record for record in new if record["kind"] == "row"}
    assert all(record["compiled"] for record in new if record["kind"] != "run")
    hybrid, full = rows["hybrid"], rows["full-autocast"]
    assert hybrid["gate"]["passed"] and "memory" not in hybrid
    assert hybrid["speedup"]["full-autocast"] == pytest.approx(
        full["ms"]["p50"] / hybrid["ms"]["p50"], abs=1e-3
    )
    assert main([*TRAIN, "--resume", str(path)]) == 0  # the plain ones are still known
    assert "torch.compile" not in capsys.readouterr().out
    assert {record["kind"] for record in records(path)[before + len(new) :]} == {"run", "row"}


def test_where_nothing_compiles_it_is_said_at_once(capsys, monkeypatch):
    monkeypatch.setattr("artemis.training.compiling.can_compile", lambda device: False)
    assert main([*TRAIN, "--compile"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "--compile: torch.compile needs" in captured.err


def test_a_wrong_arm_is_not_timed(tmp_path, capsys, monkeypatch):
    """One that skips the gradient through a frozen layer: faster, and no training step."""

    def wrong(model):
        adapted = hybrid(model)
        for layer in model.model.layers:
            layer.mlp.up_proj.register_forward_pre_hook(lambda module, args: (args[0].detach(),))
        return adapted

    arm = replace(ARMS["hybrid"], name="wrong", what="a step that drops dX", adapt=wrong)
    monkeypatch.setitem(ARMS, "wrong", arm)
    monkeypatch.setattr("artemis.cli.bench.TRAINING", ("wrong", *TRAINING))
    monkeypatch.setattr("artemis.benchmark.jobs.lines", worker.run)  # where the arm is known
    path = tmp_path / "wrong.jsonl"
    arguments = ["bench", "train", "--models", "64x1", "--tokens", "32", "--sequence", "16"]
    arguments += ["--arms", "wrong", "hybrid", "--rounds", "2", "--json", str(path)]
    assert main(arguments) == 1
    assert "not timed, since inaccurate: a step that drops dX" in capsys.readouterr().err
    found = {row["arm"]: row for row in records(path) if row["kind"] == "row"}
    assert "ms" in found["hybrid"] and "ms" not in found["wrong"]
    assert not any("ms" in r for r in records(path) if r.get("arm") == "wrong")


@pytest.mark.parametrize("alone", [True, False])
def test_an_arm_that_runs_out_of_memory_costs_only_itself(tmp_path, capsys, monkeypatch, alone):
    """It is tried again by itself; where it does not fit even so, it is left out."""
    prepare, tried = worker.prepare, []

    def full(step):
        tried.append(step.arm)
        if step.arm == "hybrid" and (alone or tried.count("hybrid") == 1):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prepare(step)

    monkeypatch.setattr("artemis.benchmark.worker.prepare", full)
    monkeypatch.setattr("artemis.benchmark.jobs.lines", worker.run)
    path = tmp_path / "full.jsonl"
    arguments = ["bench", "train", "--models", "64x1", "--tokens", "32", "--sequence", "16"]
    arguments += ["--arms", "full-bf16", "hybrid", "full-fp32"]
    arguments += ["--rounds", "2", "--json", str(path)]
    assert main(arguments) == 0
    assert tried == ["full-bf16", "hybrid", "full-fp32", "hybrid"]
    rows = {row["arm"]: row for row in records(path) if row["kind"] == "row"}
    assert "ms" in rows["full-bf16"] and "ms" in rows["full-fp32"]
    captured = capsys.readouterr()
    said = [line for line in captured.err.splitlines() if "out of memory" in line]
    if alone:
        assert rows["hybrid"]["failed"] == "out of memory" and "ms" not in rows["hybrid"]
        assert said == [
            "not measured: train by hybrid, 64x1: 1 layer, a vocabulary of 4,096, 2 × 16 tokens:"
            " out of memory"
        ]
    else:
        assert rows["hybrid"]["gate"]["passed"] and "ms" in rows["hybrid"] and not said


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("artemis.benchmark.session.measured_peaks", lambda: 1 / 0)
    assert main([*TRAIN, "--json", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and str(tmp_path) in captured.err


def test_a_file_that_was_cut_short_is_resumed(trained, tmp_path, monkeypatch):
    """As a full disk leaves it: what is not whole is measured again."""
    lines = of_first_run(trained)
    path = written(tmp_path / "cut.jsonl", lines)
    last_step = [json.dumps(record) for record in lines if record["kind"] == "step"][-1]
    text = path.read_text()
    cut = text[: text.index(last_step) + len(last_step) // 2]
    path.write_text(cut)
    monkeypatch.setattr("artemis.benchmark.jobs.lines", worker.run)
    assert main([*TRAIN, "--resume", str(path)]) == 0
    assert path.read_text().startswith(f"{cut}\n")
    new = [json.loads(line) for line in path.read_text()[len(cut) :].splitlines()[1:]]
    assert [record["kind"] for record in new] == ["run", "step", "row", "row"]
    assert Step.from_dict(new[1]) == Step.from_dict(json.loads(last_step))


def test_decode_and_its_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "decode.jsonl", tmp_path / "decode.png"
    arguments = ["bench", "decode", "--models", "64x1", "--prompt", "16", "--rounds", "2"]
    arguments += ["--arms", "full-bf16", "hybrid", "--json", str(path), "--plot", str(picture)]
    assert main(arguments) == 0
    rows = [record for record in records(path) if record["kind"] == "row"]
    plain = rows[0]
    assert [row["arm"] for row in rows] == ["full-bf16", "hybrid"]
    for phase, tokens in (("prefill", 16), ("decode", 1)):
        for row in rows:
            found, ms = row[phase], row[phase]["ms"]["p50"]
            assert found["tokens_per_second"] == pytest.approx(1e3 * tokens / ms, abs=1e-3)
            faster = plain[phase]["ms"]["p50"] / ms
            assert found["speedup"]["full-bf16"] == pytest.approx(faster, abs=1e-3)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "decode tokens/s" in capsys.readouterr().out


def test_memory(tmp_path):
    path = tmp_path / "memory.jsonl"
    arguments = ["bench", "memory", "--models", "128x2", "--tokens", "64", "--sequence", "32"]
    assert main([*arguments, "--arms", "full-autocast", "hybrid", "--json", str(path)]) == 0
    full, hybrid = (record for record in records(path) if record["kind"] == "row")
    parameters = 2 * 4096 * 128 + 2 * 128 * (4 * 128 + 3 * 352)
    assert full["memory"]["states"] == pytest.approx(16 * parameters, rel=0.01)
    assert full["memory"]["peak"] > full["memory"]["states"] > hybrid["memory"]["states"]


def test_memory_with_checkpointing(tmp_path, capsys):
    path = tmp_path / "memory.jsonl"
    arguments = ["bench", "memory", "--models", "128x6", "--tokens", "1024", "--json", str(path)]
    assert main([*arguments, "--arms", "full-bf16", "full-bf16-checkpointed"]) == 0
    kept, recomputed = (record for record in records(path) if record["kind"] == "row")
    assert recomputed["memory"]["states"] == kept["memory"]["states"]
    a_layer = 1024 * (8 * 128 + 3 * 352) * 2  # at the least: projections' inputs and outputs, bf16
    saved = kept["memory"]["peak"] - recomputed["memory"]["peak"]
    assert saved > 3 * a_layer
    share = kept["memory"]["peak"] / recomputed["memory"]["peak"]
    assert kept["peak_of"]["full-bf16-checkpointed"] == pytest.approx(share, abs=1e-4)
    assert "all bf16, checkpointed" in capsys.readouterr().out


def test_only_memory_checkpoints_by_itself(monkeypatch):
    wanted = {}

    def keep(session, settings, *rounds):
        wanted[module] = settings[0].arms
        return []

    for module in ("train", "footprint"):
        monkeypatch.setattr(f"artemis.benchmark.{module}.run", keep)
        main(["bench", {"footprint": "memory"}.get(module, module), "--models", "64x1"])
    assert set(wanted["footprint"]) - set(wanted["train"]) == {
        name for name, arm in ARMS.items() if arm.recomputes
    }
    assert "hybrid-int8-checkpointed" in wanted["footprint"]
    assert ("full-int8" in wanted["train"]) == ARMS["full-int8"].installed


@pytest.mark.parametrize("kind", ["train", "decode"])
def test_arms_whose_package_is_missing_are_left_out(kind, monkeypatch):
    wanted = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(
        f"artemis.benchmark.{kind}.run",
        lambda session, settings, rounds: wanted.extend(settings) or [],
    )
    assert main(["bench", kind, "--models", "64x1"]) == 0
    arms = wanted[0].arms
    assert "hybrid" in arms and "full-bf16" in arms and not {"peft", "full-int8"} & set(arms)


@pytest.fixture
def uncompiled():
    """`torch.compile` does nothing: it would take longer than all the rest."""
    from torch._dynamo import config

    with config.patch(disable=True):
        yield


@pytest.mark.usefixtures("uncompiled")
def test_kernels_and_their_roofline(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "kernels.jsonl", tmp_path / "kernels.png"
    arguments = ["bench", "kernels", "--models", "64x1", "--layers", "q", "gate", "block", "qkv"]
    arguments += ["--tokens", "1", "32", "--rounds", "2"]
    assert main([*arguments, "--json", str(path), "--plot", str(picture)]) == 0
    rows = [record for record in records(path) if record["kind"] == "row"]
    expected = {"artemis", "artemis, int8", "plain", "addmm", "bare", "peft"}
    expected |= {"peft, fp32 adapters"} if rows[0]["dtype"] == "bfloat16" else set()
    assert {row["provider"] for row in rows} >= expected
    assert {row["pass"] for row in rows} == {"forward", "both"}
    assert all(row["gate"]["passed"] for row in rows)
    for row in rows:
        assert row["over_floor"] > 0 and row["gflops"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    count = len(rows)
    assert main([*arguments, "--resume", str(path)]) == 0
    assert sum(record["kind"] == "row" for record in records(path)) == count
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--models", "llama-2-8b"], "'llama-2-8b', allowed: HIDDENxLAYERS or"),
        (["train", "--models", "100x2"], "got '100x2', allowed: a hidden size in multiples of 64"),
        (["train", "--tokens", "100"], "--tokens: got 100, allowed: multiples of 128"),
        (["train", "--arms", "full"], "--arms: got 'full', allowed: full-fp32"),
        (["train", "--rounds", "1"], "--rounds: got 1, allowed: an integer from 2"),
        (["train", "--compile", "--arms", "hybrid-checkpointed"], "got 'hybrid-checkpointed', all"),
        (["train", "--compile", "--arms", "hybrid-fused"], "got 'hybrid-fused', allowed:"),
        (["decode", "--arms", "full-autocast"], "--arms: got 'full-autocast', allowed:"),
        (["decode", "--arms", "full-int8"], "--arms: got 'full-int8', allowed:"),
        (["decode", "--prompt", "1"], "--prompt: got 1, allowed: an integer from 2"),
        (["memory", "--models", "64x1", "--measure", "parts"], "allowed: from 2 layers"),
        (["kernels", "--layers", "w"], "--layers: got 'w', allowed: q, k, v"),
        (["kernels", "--ranks", "0"], "--ranks: got 0, allowed: integers from 1"),
    ],
)
def test_errors_are_one_line(capsys, arguments, message):
    assert main(["bench", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err


def test_a_plot_without_matplotlib_fails_before_anything_runs(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*TRAIN, "--plot", "x.png"]) == 1
    assert "--plot needs matplotlib" in capsys.readouterr().err
