"""Sections of `make gpu` where something fails: that fails, by its name, and nothing beside it."""

import json

import pytest
import torch

from artemis.benchmark.operations import OPERATIONS
from artemis_kernels.core.device import why_no_triton
from bench import tuned
from bench.gpu import __main__ as script
from bench.gpu import accuracy, frozen, groups, loss, models, packed, products, tuning
from bench.gpu.summary import summary

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(why_no_triton(CPU) is not None, reason="the interpreter is off")
HEADER = {
    "gpu": None, "versions": {}, "commit": None, "dirty": False, "time": "now", "run": "a",
}  # fmt: skip
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory")
BROKEN = RuntimeError("no such kernel")


def raising(error: Exception):
    def run(*args, **kwargs):
        raise error

    return run


@pytest.mark.parametrize("part", ["operands", "Truth", "forced"])
@pytest.mark.parametrize(("error", "passed"), [(NO_MEMORY, None), (BROKEN, False)], ids=str)
def test_a_case_without_memory_did_not_run_and_is_not_wrong(monkeypatch, part, error, passed):
    monkeypatch.setattr(accuracy, part, raising(error))
    rows = list(accuracy.check(OPERATIONS[0], "split", CPU, tiny=True))
    assert rows and all(row["passed"] is passed for row in rows)
    state = "incomplete" if passed is None else "failed"
    assert script._state("passed", rows) == state
    assert str(error) in rows[0]["where"]
    counts = "0 | 3" if passed is None else "3 | 0"
    text = summary(HEADER, {"accuracy": state}, {"accuracy": rows})
    assert f"| lora_linear | split | float16 | 3 | {counts} |" in text


@interpreted
@pytest.mark.parametrize("base", frozen.BASES)
def test_a_frozen_layer_that_is_off_is_seen(monkeypatch, base):
    right = frozen.frozen_linear
    monkeypatch.setattr(frozen, "frozen_linear", lambda *args, **how: 1.1 * right(*args, **how))
    rows = list(frozen.check(base, CPU, tiny=True))
    assert {row["strategy"] for row in rows} == {f"lora over {base}", f"bottleneck over {base}"}
    assert not any(row["passed"] for row in rows)


def test_a_broken_loss_leaves_torch_beside_it(monkeypatch):
    monkeypatch.setattr(loss, "_ours", raising(BROKEN))
    rows = {row["provider"]: row for row in loss.losses(CPU, tiny=True, rounds=1)}
    assert rows["artemis"]["passed"] is False and "no such kernel" in rows["artemis"]["where"]
    assert "ms" not in rows["artemis"] and rows["torch"]["ms"]["p50"] > 0


@interpreted
def test_a_loss_that_torch_has_no_memory_for_leaves_all_else_of_its_section(monkeypatch):
    monkeypatch.setattr(loss, "_plain", raising(NO_MEMORY))
    rows = list(script._section("groups", "", CPU, tiny=True, rounds=1))
    torchs, ours, *joined = rows
    assert torchs["provider"] == "torch" and torchs["passed"] is None and "ms" not in torchs
    assert ours["kind"] == "loss" and ours["passed"] and ours["ms"]["p50"] > 0
    assert len(joined) >= 6 and all(row["passed"] and "ms" in row for row in joined)
    assert script._state("passed", rows) == "passed"  # a peer is not judged


def bare_without_memory(monkeypatch, section) -> None:
    if section is packed:
        monkeypatch.setattr(packed, "_bare", raising(NO_MEMORY))
        return
    ways = section._ways
    monkeypatch.setattr(section, "_ways", lambda *how: ways(*how) | {"bare": raising(NO_MEMORY)})


@interpreted
@pytest.mark.parametrize("section", [groups, packed, products], ids=lambda s: s.__name__)
def test_a_peer_without_memory_leaves_ours_timed(monkeypatch, section):
    name = section.__name__.rpartition(".")[2]
    bare_without_memory(monkeypatch, section)
    rows = list(getattr(section, name)(CPU, tiny=True, rounds=1))
    bare = [row for row in rows if row["provider"] == "bare"]
    ours = [row for row in rows if row["provider"].startswith("artemis")]
    assert bare and all(row["passed"] is None and "ms" not in row for row in bare)
    assert len(ours) >= 2 * len(bare) and all(row["ms"]["p50"] > 0 for row in ours)


@pytest.mark.parametrize("section", [groups, packed, products], ids=lambda s: s.__name__)
def test_a_workload_that_breaks_off_is_told_and_the_next_one_comes(monkeypatch, section):
    name = section.__name__.rpartition(".")[2]
    judge = "_judged" if section is packed else "_checked"
    monkeypatch.setattr(section, judge, raising(NO_MEMORY))
    rows = list(getattr(section, name)(CPU, tiny=True, rounds=1))
    assert len(rows) == len(list(section.workloads(tiny=True))) > 1
    assert all(row["provider"] == "artemis" and row["passed"] is None for row in rows)
    assert script._state("passed", rows) == "incomplete"


def test_a_loss_that_is_no_number_is_wrong(monkeypatch):
    """Its gradient is right."""
    right = torch.nn.functional.cross_entropy
    monkeypatch.setattr(loss, "_ours", lambda x, target: right(x, target) + torch.nan)
    rows = {row["provider"]: row for row in loss.losses(CPU, tiny=True, rounds=1)}
    assert rows["artemis"]["passed"] is False


def rows_of(monkeypatch, arm: str, how) -> dict[tuple[str, str], dict]:
    """All rows where `arm` is prepared by `how`."""
    for name in ("TRAINING", "DECODING"):
        monkeypatch.setattr(models, name, ("full-bf16", "hybrid", "hybrid-int8"))
    usual = models._prepared

    def prepared(workload, name, cell):
        found = usual(workload, name, cell)
        return how(found) if name == arm else found

    monkeypatch.setattr(models, "_prepared", prepared)
    found = models.models(CPU, tiny=True, rounds=1)
    return {(row["kind"], row["arm"]): row for row in found}


def without_dx(prepared):
    """Cut the gradient through the down projection's base, as a wrong fast step might."""
    for layer in prepared.step.model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0].detach(),))
    return prepared


def test_an_arm_that_is_wrong_is_not_timed(monkeypatch):
    rows = rows_of(monkeypatch, "hybrid", without_dx)
    wrong = rows["train", "hybrid"]
    assert not wrong["passed"] and wrong["error"] > 1 and "ms" not in wrong
    assert rows["decode", "hybrid"]["passed"]  # its logits are right
    assert rows["train", "hybrid-int8"]["speedup"].keys() == {"full-bf16"}


def test_an_arm_that_breaks_leaves_the_others_in_turns(monkeypatch):
    rows = rows_of(monkeypatch, "hybrid", raising(BROKEN))
    assert [key for key, row in rows.items() if "ms" not in row] == [
        ("train", "hybrid"), ("decode", "hybrid")
    ]  # fmt: skip
    assert rows["train", "hybrid"]["passed"] is False
    assert "full-bf16" in rows["train", "hybrid-int8"]["speedup"]


def test_arms_that_do_not_fit_together_are_timed_one_by_one(monkeypatch):
    rows = rows_of(monkeypatch, "hybrid", raising(NO_MEMORY))
    assert rows["train", "hybrid"]["passed"] is None
    assert "out of memory" in rows["train", "hybrid"]["where"]
    assert rows["train", "hybrid-int8"]["ms"]["p50"] > 0
    assert rows["train", "hybrid-int8"]["speedup"] == {}  # of no common round


def test_a_speed_is_formed_within_each_round():
    times = {"full-bf16": [1.0, 2.0, 9.0], "hybrid": [3.0, 1.0, 2.0]}
    assert models._speedup(times, "hybrid")["full-bf16"]["p50"] == 2.0


@pytest.mark.parametrize("rounds", [1, 10])
def test_a_rehearsal_is_of_one_layer_and_of_what_compiles_kernels(monkeypatch, rounds):
    layers, seen = set(), set()

    def measured(workload, arms, cell, *where):
        layers.add(cell.layers)
        seen.update(arms)
        return []

    monkeypatch.setattr(models, "_measured", measured)
    list(models.models(CPU, tiny=False, rounds=rounds))
    assert layers == ({1} if rounds == 1 else {2, 16})
    ours = {"hybrid", "hybrid-int8", "hybrid-int4"}
    assert seen == ours if rounds == 1 else seen > ours


def test_tuned_entries_come_as_they_are_written(tmp_path):
    entry = {"chosen": "a", "usual": "b", "rounds": 1, "ms": {}}
    table, seen = tmp_path / "chip.json", set()
    table.write_text(json.dumps({"strategies": {}, "tiles": {"one": entry}}))
    assert [row["key"] for row in tuning._new(tmp_path, seen, "op")] == ["one"]
    table.write_text(json.dumps({"strategies": {"one": entry}, "tiles": {"one": entry}}))
    assert [row["part"] for row in tuning._new(tmp_path, seen, "op")] == ["strategies"]


def test_what_a_gpu_tuned_is_no_row_of_the_document(tmp_path):
    """All results are read together, and those of `bench.tuned` have heads of their own."""
    entry = {"chosen": "a", "usual": "b", "rounds": 1, "ms": {}}
    (tmp_path / "chip.json").write_text(json.dumps({"strategies": {"one": entry}}))
    rows = [row | {"run": "a"} for row in tuning._new(tmp_path, set(), "lora_linear")]
    assert rows and tuned.table([{"kind": "run", "run": "a"}, *rows]) == ""
