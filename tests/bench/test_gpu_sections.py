"""Sections of `make gpu` where something fails: that fails, by its name, and nothing beside it."""

import json
import subprocess

import pytest
import torch

from artemis.benchmark import prepare, timer
from artemis.benchmark.operations import OPERATIONS
from artemis_kernels.core.device import why_no_triton
from bench import tuned
from bench.gpu import __main__ as script
from bench.gpu import (
    accuracy,
    between,
    frozen,
    groups,
    loss,
    machinery,
    models,
    operations,
    packed,
    products,
    tuning,
)
from bench.gpu.sections import rows_of
from bench.gpu.summary import summary

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(why_no_triton(CPU) is not None, reason="the interpreter is off")
HEADER = {
    "gpu": None, "versions": {}, "commit": None, "dirty": None, "code": "c0de", "time": "now",
    "run": "a",
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
    rows = list(rows_of("groups", "", CPU, tiny=True, rounds=1))
    torchs, ours = (row for row in rows if row["kind"] == "loss")
    joined = [row for row in rows if row["kind"] == "group"]
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


@pytest.fixture
def quick(monkeypatch):
    """Operations without a compiler, and with rates and a cache that take no time."""
    monkeypatch.setattr(operations, "_COMPILED", ())
    monkeypatch.setattr(operations, "gemm", lambda *given: 1.0)
    monkeypatch.setattr(operations, "copy", lambda *given: 1.0)
    monkeypatch.setattr(timer, "_FLUSHED_BYTES", 1)


@interpreted
def test_operations_without_memory_leave_the_next_ones(monkeypatch, quick):
    """The first workload breaks off outside any provider, as where the fp64 truth does not fit."""
    usual, calls = prepare.Truth, []

    def truth(*given, **how):
        calls.append(given)
        if len(calls) == 1:
            raise NO_MEMORY
        return usual(*given, **how)

    monkeypatch.setattr(prepare, "Truth", truth)
    peaks, broken, *rows = operations.operations(CPU, tiny=True, rounds=1)
    assert peaks["kind"] == "peaks" and broken["passed"] is None and broken["dropout"] == 0.1
    assert {row["op"] for row in rows} == {"adapter_linear", "bottleneck_adapter"}
    assert all(row["passed"] and row["ms"]["p50"] > 0 for row in rows)
    assert script._state("passed", [broken, *rows]) == "incomplete"


@interpreted
def test_a_peer_that_only_breaks_with_dropout_leaves_the_others(monkeypatch, quick):
    """It is checked without: a compiler may make no backward of the other."""
    usual = prepare.peers

    def peers(operation, sizes, tensors, dropout):
        found = usual(operation, sizes, tensors, dropout)

        def without_backward(t, run=found["addmm"]):
            y = run(t)
            y.register_hook(raising(BROKEN))
            return y

        return found | ({"addmm": without_backward} if dropout else {})

    monkeypatch.setattr(prepare, "peers", peers)
    first, *_ = operations.workloads(tiny=True)
    assert first.dropout
    monkeypatch.setattr(operations, "workloads", lambda tiny: [first])
    _, *found = operations.operations(CPU, tiny=True, rounds=1)
    rows = {row["provider"]: row for row in found}
    assert rows["addmm"]["passed"] is False and "ms" not in rows["addmm"]
    assert "no such kernel" in rows["addmm"]["where"]
    assert all("ms" in row for name, row in rows.items() if name != "addmm") and len(rows) > 5


def test_a_layer_that_is_not_tuned_leaves_the_next_ones(monkeypatch):
    usual = tuning.search.of_calls

    def of_calls(calls, *where, **how):
        if calls[0][0].op == "quantized_linear":
            raise NO_MEMORY
        return usual(calls, *where, **how)

    monkeypatch.setattr(tuning.search, "of_calls", of_calls)
    rows = list(tuning.tuning(CPU, tiny=True, rounds=1))
    (broken,) = [row for row in rows if "passed" in row]
    assert broken["op"] == "quantized_linear" and broken["passed"] is None
    assert {row["op"].partition(":")[0] for row in rows if "chosen" in row} == {
        "adapter_linear", "frozen_linear"
    }  # fmt: skip
    assert "CUDA out of memory" in summary(HEADER, {"tuning": "incomplete"}, {"tuning": rows})


def test_strategies_are_tuned_before_tiles_and_those_all_at_once(monkeypatch):
    from artemis_kernels.core.device import CHIPS
    from artemis_kernels.tuner import tiles

    asked = []

    def noting(part):
        return lambda calls, *where, **how: asked.append((part, len(calls), how.get("most")))

    monkeypatch.setattr(tuning.devices, "chip", lambda device: CHIPS["sm_90"])
    monkeypatch.setattr(tuning.search, "of_calls", noting("strategies"))
    monkeypatch.setattr(tiles, "search", noting("tiles"))
    assert not list(tuning.tuning(torch.device("cuda"), tiny=False, rounds=9))
    *strategies, last = asked
    assert strategies == [("strategies", 1, None)] * len(tuning.LAYERS)
    assert last == ("tiles", len(tuning.LAYERS), tuning._MOST_TILES)


@pytest.mark.parametrize(
    "error", [subprocess.CalledProcessError(1, "gcc"), FileNotFoundError("gcc")], ids=repr
)
def test_a_launcher_that_no_compiler_builds_fails_its_case(monkeypatch, error):
    """Triton has one built by a C compiler for every kernel."""
    monkeypatch.setattr(accuracy, "forced", raising(error))
    monkeypatch.setattr(machinery, "forced", raising(error))
    for rows in (
        accuracy.check(OPERATIONS[0], "split", CPU, tiny=True),
        machinery._of_each(machinery._fp32, "fp32", CPU, tiny=True),
    ):
        assert {row["passed"] for row in rows} == {False}


@interpreted
def test_other_bits_of_a_second_run_are_seen(monkeypatch):
    usual, runs = machinery._public, []

    def public(operation, given):
        runs.append(operation)
        return usual(operation, given) * (1 + 1e-6 * len(runs))

    monkeypatch.setattr(machinery, "_public", public)
    monkeypatch.setattr(machinery, "OPERATIONS", OPERATIONS[-1:])
    (row,) = machinery._of_each(machinery._same_bits, "bits", CPU, tiny=True)
    assert row["passed"] is False and "y, x" in row["where"]


def test_training_that_graphs_change_is_seen(monkeypatch):
    usual, runs = machinery.trained.random_tokens, []

    def tokens(*sizes):
        runs.append(sizes)
        return usual(*sizes).roll(len(runs), 0)

    (row,) = machinery.check("trained", CPU, tiny=True)
    assert row["passed"] is True and "equal, loss 6." in row["where"]
    monkeypatch.setattr(machinery.trained, "random_tokens", tokens)
    (row,) = machinery.check("trained", CPU, tiny=True)
    assert row["passed"] is False and " differ, most hybrid_adapter." in row["where"]


@interpreted
@pytest.mark.parametrize("seeds", ["equal", "another in the backward"])
def test_a_mask_that_is_not_drawn_anew_is_seen(monkeypatch, seeds):
    usual, grad = machinery.artemis_kernels.lora_linear, torch.autograd.grad

    def with_one_seed(*given, **how):
        return usual(*given, **how, seed=3)

    def of_another_mask(y, x, dy):
        return grad(usual(x, *2 * [torch.eye(34)], torch.eye(34), 1.0, dropout_p=0.5), x, dy)

    if seeds == "equal":
        monkeypatch.setattr(machinery.artemis_kernels, "lora_linear", with_one_seed)
    else:
        monkeypatch.setattr(machinery.torch.autograd, "grad", of_another_mask)
    (row,) = machinery._masks(CPU, tiny=True)
    assert row["passed"] is False


@interpreted
def test_dx_of_a_head_that_is_off_is_seen(monkeypatch):
    usual = machinery.artemis_kernels.quantized_linear
    monkeypatch.setattr(
        machinery.artemis_kernels, "quantized_linear", lambda *g, **how: 1.1 * usual(*g, **how)
    )
    (row,) = machinery._head(CPU, tiny=True)
    assert row["where"].endswith("int8_logits") and row["ratio"] > 1 and not row["passed"]


def test_a_loss_that_is_no_number_is_wrong(monkeypatch):
    """Its gradient is right."""
    right = torch.nn.functional.cross_entropy
    monkeypatch.setattr(loss, "_ours", lambda x, target: right(x, target) + torch.nan)
    rows = {row["provider"]: row for row in loss.losses(CPU, tiny=True, rounds=1)}
    assert rows["artemis"]["passed"] is False


@interpreted
@pytest.mark.parametrize("wrong", ["results", "gradients"])
@pytest.mark.parametrize("op", ["rms_norm", "gated_activation", "rotary_embedding"])
def test_what_is_off_between_products_is_seen(monkeypatch, op, wrong):
    usual = between._by

    def off(name, impl):
        right, share = usual(name, impl), 1e-4 if (name, impl) == (op, "triton") else 0.0

        def run(x, *given):
            if wrong == "gradients":  # the same number, of another slope
                return right(x + share * (x - x.detach()), *given)
            results = right(x, *given)
            many = results if isinstance(results, tuple) else (results,)
            return tuple((1 + share) * result for result in many)

        return run

    monkeypatch.setattr(between, "_by", off)
    checked = [row for row in between.check(CPU, tiny=True) if row["dtype"] == "float32"]
    assert {row["op"] for row in checked if not row["passed"]} == {op}
    timed = [row for row in between.between(CPU, True, 1) if row.get("provider") == "artemis"]
    assert {row["op"] for row in timed if not row["passed"]} == {op}
    assert all(("ms" in row) is row["passed"] for row in timed)


@interpreted
def test_torch_without_memory_between_products_leaves_ours(monkeypatch):
    monkeypatch.setitem(between._COMPOSED, "rms_norm", raising(NO_MEMORY))
    rows = [row for row in between.between(CPU, True, 1) if row.get("op") == "rms_norm"]
    for row in rows:
        assert ("ms" in row) is (row["provider"] == "artemis") and "over_torch" not in row


def test_a_broken_norm_is_told_beside_the_others(monkeypatch):
    monkeypatch.setattr(between, "norm", raising(BROKEN))
    rows = [row for row in between.between(CPU, True, 1) if row["kind"] == "between"]
    broken = [row for row in rows if row["op"] == "rms_norm"]
    assert [row["passed"] for row in broken] == [False, False]
    assert all("no such kernel" in row["where"] for row in broken)
    assert {row["op"] for row in rows} == {"rms_norm", "gated_activation", "rotary_embedding"}


def rows_where(monkeypatch, arm: str, how) -> dict[tuple[str, str], dict]:
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
    rows = rows_where(monkeypatch, "hybrid", without_dx)
    wrong = rows["train", "hybrid"]
    assert not wrong["passed"] and wrong["error"] > 1 and "ms" not in wrong
    assert rows["decode", "hybrid"]["passed"]  # its logits are right
    assert rows["train", "hybrid-int8"]["speedup"].keys() == {"full-bf16"}


def test_an_arm_that_breaks_leaves_the_others_in_turns(monkeypatch):
    rows = rows_where(monkeypatch, "hybrid", raising(BROKEN))
    assert [key for key, row in rows.items() if "ms" not in row] == [
        ("train", "hybrid"), ("decode", "hybrid")
    ]  # fmt: skip
    assert rows["train", "hybrid"]["passed"] is False
    assert "full-bf16" in rows["train", "hybrid-int8"]["speedup"]


def test_arms_that_do_not_fit_together_are_timed_one_by_one(monkeypatch):
    rows = rows_where(monkeypatch, "hybrid", raising(NO_MEMORY))
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
    ours = {"hybrid", "hybrid-fused", "hybrid-int8", "hybrid-int4"}  # and fp8 on a GPU
    assert seen == ours if rounds == 1 else seen > ours


def test_tuned_entries_come_as_they_are_written(tmp_path):
    entry = {"chosen": "a", "usual": "b", "rounds": 1, "ms": {}}
    table, seen = tmp_path / "chip.json", set()
    assert not list(tuning._new(table, seen, "op"))
    table.write_text(json.dumps({"strategies": {}, "tiles": {"one": entry}}))
    assert [row["key"] for row in tuning._new(table, seen, "op")] == ["one"]
    table.write_text(json.dumps({"strategies": {"one": entry}, "tiles": {"one": entry}}))
    assert [row["part"] for row in tuning._new(table, seen, "op")] == ["strategies"]


def test_what_a_gpu_tuned_is_no_row_of_the_document(tmp_path):
    """All results are read together, and those of `bench.tuned` have heads of their own."""
    entry = {"chosen": "a", "usual": "b", "rounds": 1, "ms": {}}
    (tmp_path / "chip.json").write_text(json.dumps({"strategies": {"one": entry}}))
    rows = [row | {"run": "a"} for row in tuning._new(tmp_path / "chip.json", set(), "lora_linear")]
    assert rows and tuned.table([{"kind": "run", "run": "a"}, *rows]) == ""
