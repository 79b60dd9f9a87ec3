"""Measured choices: what is kept, what is read, and that dispatch follows it."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

import artemis_kernels
from artemis.cli import main
from artemis_kernels.core import native, strategies, tables, tiling, tuning
from artemis_kernels.core.device import CHIPS, multiplies_int8
from artemis_kernels.core.frozen import most_rows_here
from artemis_kernels.core.quantized import QuantizedWeight
from artemis_kernels.core.strategies import OPERATIONS, WEIGHTS, Case, candidates
from artemis_kernels.core.tiling import Shape
from artemis_kernels.ops.adapter_linear.op import fold_or_plain
from artemis_kernels.tuner import search, timing
from artemis_kernels.tuner.requests import case_of
from artemis_kernels.tuner.workload import Workload
from tests import kit

CASE = Case("adapter_linear", 32, 64, 96, 8, "float32", trains=True)
USUAL = fold_or_plain(*CASE[1:5], True)[0]
OTHER = {"folded": "plain", "plain": "folded"}[USUAL]
HOPPER = CHIPS["sm_90"]


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Tables of this test alone."""
    monkeypatch.setattr(tables, "USER_TABLES", tmp_path / "user")
    monkeypatch.setattr(tables, "SHIPPED_TABLES", tmp_path / "shipped")
    tables.reload()
    yield
    tables.reload()


def user(chip=None):
    return tables.path_of(tables.USER_TABLES, tables.name_of(chip))


def around(ms: float) -> list[float]:
    return [0.99 * ms, ms, 1.01 * ms]


def tune(measure, cases=(CASE,), path=None, usual=USUAL, chip=None):
    found = search.strategies(
        cases, path or user(), chip, usual=lambda case: usual, measure=measure, rounds=3,
        progress=False,
    )  # fmt: skip
    tables.reload()
    return found


def other_wins(case, names):
    return {name: around(1.0 if name == OTHER else 2.0) for name in names}


def explained(rows: int, dtype=torch.float32, trains=True, out=96, **options):
    one = torch.zeros(1, 1, dtype=dtype)
    down = torch.zeros(8, out).requires_grad_(trains)
    return artemis_kernels.explain(
        "adapter_linear", one.expand(rows, 64), one.expand(out, 64), down, torch.zeros(out, 8),
        **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("usual", "other", "kept"),
    [
        ([1.05, 1.06, 1.07], [0.9, 1.0, 1.01], True),
        ([1.04, 1.05, 1.06], [0.9, 1.0, 1.01], False),  # 5 % is not more than 5 %
        ([1.00, 1.10, 1.20], [0.9, 1.0, 1.02], False),  # the percentiles overlap
        ([0.80, 0.90, 0.91], [0.9, 1.0, 1.01], False),
    ],
)
def test_only_wins_beyond_doubt_are_kept(usual, other, kept):
    found = tune(lambda case, names: {USUAL: usual, OTHER: other})
    entry = found[CASE.key]
    assert entry["usual"] == USUAL and entry["chosen"] == (OTHER if kept else USUAL)
    assert entry["ms"] == {USUAL: usual, OTHER: other}
    assert entry["torch"] == torch.__version__ and entry["rounds"] == 3 and entry["date"]
    assert tables.read(user(), None)["strategies"] == found
    assert ("tuned" in explained(32).reason) is kept


def test_dispatch_follows_the_table_for_its_cases_alone():
    assert explained(32).strategy == USUAL and "tuned" not in explained(32).reason
    tune(other_wins)
    for rows in (17, 32):
        choice = explained(rows)
        assert choice.strategy == OTHER
        assert f"tuned: 1 ms against 2 ms of {USUAL} (the user's table" in choice.reason
    others = (
        explained(16), explained(33), explained(32, torch.bfloat16), explained(32, trains=False),
        explained(32, out=97), explained(32, dropout_p=0.1),
    )  # fmt: skip
    assert not any("tuned" in other.reason for other in others)


def test_the_tuned_strategy_is_what_runs(monkeypatch):
    from artemis_kernels.ops.adapter_linear import op

    tune(other_wins)
    taken, operator = [], op._operator
    monkeypatch.setattr(op, "_operator", lambda *a: taken.append(a[13]) or operator(*a))
    x, weight = torch.randn(32, 64), torch.randn(96, 64)
    down = torch.randn(8, 96, requires_grad=True)
    artemis_kernels.adapter_linear(x, weight, down, torch.randn(96, 8))
    assert taken == [OTHER]
    compiled = torch.compile(
        lambda x: artemis_kernels.adapter_linear(x, weight, down, torch.ones(96, 8)),
        backend="aot_eager", fullgraph=True, dynamic=True,
    )  # fmt: skip
    compiled(x).sum().backward()
    assert down.grad is not None


@pytest.mark.skipif(not multiplies_int8(), reason="no int8 products to choose")
def test_products_over_a_packed_weight_are_chosen_too():
    """And stay what activation_bits asks for."""
    weight = QuantizedWeight.quantize(torch.randn(32, 64))
    case = Case("quantized_linear", 32, 64, 32, 0, "float32", "int8:auto")
    x = torch.randn(20, 64)
    whole = artemis_kernels.quantized_linear(x, weight)
    tune(
        lambda case, names: {n: around(1.0 if "weight_only" in n else 2.0) for n in names},
        (case,), usual="product_int8",
    )  # fmt: skip
    choice = artemis_kernels.explain("quantized_linear", x, weight)
    assert choice.strategy == "product_weight_only" and "tuned" in choice.reason
    exact = x @ weight.dequantize().t()
    by_weight = artemis_kernels.quantized_linear(x, weight)
    assert (by_weight - exact).norm() < (whole - exact).norm() / 10
    asked = QuantizedWeight.quantize(torch.randn(32, 64), activation_bits=8)
    assert artemis_kernels.explain("quantized_linear", x, asked).strategy == "product_int8"
    none = artemis_kernels.FrozenAdapter.none(weight, dtype=torch.float32)  # as in models
    frozen = artemis_kernels.explain("frozen_linear", x, weight, none)
    assert frozen.strategy == "products_weight_only" and "tuned" in frozen.reason
    kit.assert_same_bits(artemis_kernels.frozen_linear(x, weight, none), by_weight)


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_and_copying_a_packed_weight_agree(format, dtype):
    weight = QuantizedWeight.quantize(torch.randn(32, 64), format, activation_bits=16)
    case = Case("quantized_linear", 4, 64, 32, 0, str(dtype).removeprefix("torch."), f"{format}:16")
    x = torch.randn(4, 64, dtype=dtype)
    names = candidates(case, None)
    assert {"product_weight_only_copy", "product_weight_only_direct"} < set(names)
    outputs = [
        torch.ops.artemis.quantized_linear(
            x, weight.data, None, "eager", name, weight.scale, weight.offset
        )
        for name in names
    ]
    exact = x.double() @ weight.dequantize().double().t()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert all((y.double() - exact).norm() < tolerance * exact.norm() for y in outputs)


def test_the_users_table_overrides_the_shipped_one():
    shipped = tables.path_of(tables.SHIPPED_TABLES, tables.name_of(None))
    tune(other_wins, path=shipped)
    assert explained(32).strategy == OTHER and "shipped" in explained(32).reason
    tune(lambda case, names: {USUAL: around(1.0), OTHER: around(2.0)})
    assert explained(32).strategy == USUAL and "tuned" not in explained(32).reason


def test_a_gpus_strategies_come_from_its_table():
    """Looked up by the name of the chip, checked as it is read; other chips keep their choice."""
    case = Case("lora_linear", 8192, 4096, 4096, 16, "bfloat16", trains=True)
    tune(
        lambda case, names: {n: around(1.0 if n == "split" else 2.0) for n in names},
        (case,), user(HOPPER), "vendor", HOPPER,
    )  # fmt: skip
    entry = tables.read(user(HOPPER), HOPPER)["strategies"][case.key]
    assert set(entry["ms"]) == {"one_pass", "split", "vendor"} and entry["chosen"] == "split"
    looked = ("lora_linear", "bfloat16", "tensor", True, False)
    ((most, sizes, strategy, usual, reason),) = tables.entries("sm_90", *looked)
    assert (most, sizes, strategy, usual) == (8192, (4096, 4096, 16), "split", "vendor")
    assert "tuned" in reason and tables.entries("sm_80", *looked) == ()
    entry["chosen"] = "row_block"
    tables.write(user(HOPPER), {"strategies": {case.key: entry}, "tiles": {}})
    tables.reload()
    with pytest.raises(ValueError, match="allowed: one_pass, split, vendor"):
        tuning.config("expand", Shape(8192, 64, 64, 16), HOPPER)


def test_an_entry_holds_only_against_what_it_beat():
    """Heuristics may change after a measurement, and within a bucket of rows."""
    tune(other_wins)
    device = torch.device("cpu")
    assert tables.choice(CASE, "eager", device, (USUAL, "so"))[0] == OTHER
    assert tables.choice(CASE, "eager", device, ("another", "so")) == ("another", "so")


def test_an_interrupted_run_goes_on():
    second, timed = CASE._replace(rows=64), []

    def interrupted(case, names):
        timed.append(case)
        if case == second and timed.count(second) == 1:
            raise KeyboardInterrupt
        return other_wins(case, names)

    with pytest.raises(KeyboardInterrupt):
        tune(interrupted, (CASE, second))
    assert set(tables.read(user(), None)["strategies"]) == {CASE.key}
    tune(interrupted, (CASE, second))
    assert timed == [CASE, second, second]
    assert set(tables.read(user(), None)["strategies"]) == {CASE.key, second.key}
    assert [path.name for path in user().parent.iterdir()] == [user().name]


def entry_of(chosen=USUAL, usual=USUAL, **more):
    return {
        "chosen": chosen, "usual": usual, "ms": {"folded": [1, 2, 3], "plain": [1, 2, 3]},
        "rounds": 3, "torch": "2", "triton": None, "date": "2026-01-01", **more,
    }  # fmt: skip


def text_of(key, entry, part="strategies"):
    return json.dumps({"strategies": {}, "tiles": {}, part: {key: entry}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a tuning table"),
        ("[]", "must hold strategies and tiles"),
        ('{"expand": {}}', "must hold strategies and tiles"),
        (text_of("adapter_linear 3 1 1 1 float32 tensor", entry_of()), "is no key"),
        (text_of("other", entry_of()), "'other' is no key"),
        (text_of(CASE.key, {"chosen": "plain"}), "an entry must hold chosen, date"),
        (text_of(CASE.key, entry_of("split")), "got 'split', allowed: folded, plain"),
        (text_of(CASE.key, entry_of(OTHER, ms={USUAL: [1, 2, 3]})), "times of chosen and usual"),
        (text_of(CASE.key, entry_of(ms={"plain": [1, 2, 3], "folded": [3, 2]})), "three positive"),
        (text_of(CASE.key, entry_of(ms={"plain": [1, 2, 3], "folded": [3, 2, 1]})), "must rise"),
        (text_of("expand 64 1 1 1 float32", entry_of(), "tiles"), "is no key"),  # on a CPU
    ],
)
def test_a_malformed_table_is_refused_by_name(text, message):
    user().parent.mkdir(parents=True)
    user().write_text(text)
    with pytest.raises(ValueError) as refusal:
        explained(32)
    assert message in str(refusal.value) and str(user()) in str(refusal.value)
    with pytest.raises(ValueError):
        tune(other_wins)
    assert user().read_text() == text


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("rows", [4, 64])
def test_the_usual_strategy_is_a_candidate_and_every_candidate_runs(op, weight, rows):
    trains = op != "quantized_linear" and not op.startswith("frozen_linear")
    k = 0 if op == "bottleneck_adapter" else 64
    case = Case(op, rows, k, 32, 8, "float32", weight, trains, trains and rows > 8)
    assert Case.of(case.key) == case
    names = candidates(case, None)
    if (op, weight) == ("quantized_linear", "tensor"):
        assert not names
        return
    workload = Workload(case, torch.device("cpu"))
    assert workload.usual() in names
    for name in names:
        workload.run(name, 0)


def test_a_median_and_percentiles():
    assert timing.percentiles([5.0, 1.0, 2.0, 3.0, 4.0]) == [1.8, 3.0, 4.2]


def test_alternatives_take_turns_and_the_first_round_warms_up(monkeypatch):
    """By a clock that the runs move: a first call of 100 s, and then those of their names."""
    clock, order = SimpleNamespace(now=0), []
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def run_of(seconds: int):
        def run(turn):
            clock.now += seconds if (seconds in order) else 100
            order.append(seconds)
            turns.append(turn)

        return run

    turns, rounds = [], 3
    runs = {"a": run_of(1), "b": run_of(2), "c": run_of(3)}
    times = timing.in_turns(runs, rounds, torch.device("cpu"))
    assert times == {"a": [1000.0] * 3, "b": [2000.0] * 3, "c": [3000.0] * 3}
    assert turns == list(range(3 * (rounds + 1)))  # operands go round from call to call
    each = [tuple(order[start : start + 3]) for start in turns[::3]]
    assert {tuple(sorted(names)) for names in each} == {(1, 2, 3)}
    assert len(set(each)) > 1  # nobody always runs after the same one


@pytest.mark.parametrize("weight", ["tensor", "int8:auto"])
def test_no_weight_is_still_warm_from_its_last_call(weight, monkeypatch):
    """Each comes back after all others, which are 16 where they are small."""
    case = Case("lora_linear", 4, 64, 32, 8, "float32", weight)
    workload, taken = Workload(case, torch.device("cpu")), []
    monkeypatch.setattr(workload, "_forward", lambda strategy, w: taken.append(w.data.data_ptr()))
    for turn in range(32):
        workload.run(workload.usual(), turn)
    assert len(set(taken[:16])) == 16 and taken[:16] == taken[16:]


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize("op", ["lora_linear", "adapter_linear", "bottleneck_adapter"])
def test_what_is_timed_is_the_call_of_the_case(op, drops, trains, monkeypatch):
    """Its output, and in training the gradients of x and of all that an adapter has."""
    alone = op == "bottleneck_adapter"
    case = Case(op, 8, 0 if alone else 16, 24, 4, "float32", trains=trains, drops=drops)
    workload, outputs, asked = Workload(case, torch.device("cpu")), [], []
    for tensor in workload.small:  # its biases too
        tensor.detach().normal_()
    forward, grad = workload._forward, torch.autograd.grad
    monkeypatch.setattr(workload, "_forward", lambda *a: outputs.append(forward(*a)) or outputs[0])
    monkeypatch.setattr(
        torch.autograd, "grad", lambda y, inputs, dy: asked.extend(inputs) or grad(y, inputs, dy)
    )
    workload.run(workload.usual(), 0)

    x, (down, up, bias_down, bias_up) = workload.x, workload.small
    read = (x,) if alone else (x, workload.weights[0])
    options = dict(dropout_p=0.1, seed=0) if drops else {}
    learning = [x, down, up]
    if op == "lora_linear":
        options |= dict(scale=1.0)
    else:
        options |= dict(bias_down=bias_down, bias_up=bias_up)
        learning += [bias_down, bias_up]
    torch.testing.assert_close(outputs[0], getattr(artemis_kernels, op)(*read, down, up, **options))
    assert outputs[0].requires_grad is trains
    assert list(map(id, asked)) == (list(map(id, learning)) if trains else [])


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_training_and_dropout_are_measured_as_asked(dropout, inference, tmp_path, capsys):
    words = " training" * (not inference) + " dropout" * dropout
    found = artemis_kernels.tune(
        [(16, 24, 4)], [5], dtype="float32", trains=not inference, dropout_p=0.2 * dropout,
        rounds=1, progress=False,
    )  # fmt: skip
    assert list(found["strategies"]) == ["adapter_linear 8 16 24 4 float32 tensor" + words]
    command = ["tune", "--shapes", "16x24x4", "--rows", "5", "--dtype", "float32", "--rounds", "1"]
    command += ["--inference"] * inference + ["--dropout"] * dropout
    assert main([*command, "--table", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["strategies"].keys() == found["strategies"].keys()


def test_winners_are_taken_at_once(monkeypatch):
    """By a process that has read its tables already."""
    assert explained(32).strategy == USUAL
    monkeypatch.setattr(timing, "in_turns", lambda runs, rounds, device: other_wins(CASE, runs))
    artemis_kernels.tune([(64, 96, 8)], [32], dtype="float32", progress=False)
    assert explained(32).strategy == OTHER


def test_a_real_run_and_the_command(tmp_path, capsys):
    found = artemis_kernels.tune([(16, 24, 4)], [5], dtype="float32", rounds=2)
    (entry,) = found["strategies"].values()
    assert set(entry["ms"]) == {"folded", "plain"}
    command = ["tune", "--shapes", "16x24x4", "--rows", "5", "--dtype", "float32"]
    arguments = [*command, "--rounds", "2", "--table", str(tmp_path), "--json"]
    assert main(arguments) == 0
    shown = json.loads(capsys.readouterr().out)
    assert list(shown["strategies"]) == ["adapter_linear 8 16 24 4 float32 tensor training"]
    for more in (
        [],
        ["--op", "lora_linear", "--weight", "int4:16"],
        ["--op", "bottleneck_adapter"],
    ):
        assert main([*command, *more, "--show"]) == 0
        assert "_linear: eager / " in capsys.readouterr().out or "bottleneck" in more[-1]
    packed = [*command, "--op", "quantized_linear", "--weight", "int8:auto", "--show", "--json"]
    assert main(packed) == 0
    (one,) = json.loads(capsys.readouterr().out).values()
    assert one["strategy"] == "product_weight_only" and one["reason"]
    assert main(["tune", "--shapes", "16x24", "--show"]) == 1
    assert "allowed: INxOUTxWIDTH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "relu"}, "op must be one of"),
        ({"weight": "int9"}, "weight must be one of"),
        ({"op": "quantized_linear"}, "needs a packed weight"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"device": "meta"}, "device must be 'cpu' or 'cuda'"),
        ({"device": "cuda:7"}, "'cuda:7' was asked for, and torch sees "),
        ({"rounds": 0}, "at least 1, got 0"),
        ({"rows": [0]}, "at least 1, got 0"),
        ({"shapes": [(1, 2)]}, "must be (in, out, width)"),
        ({"shapes": [(8, 8, 2), (4, 8, 2)], "op": "lora_linear_group"}, "one size in, got [4, 8]"),
        ({"shapes": [], "op": "adapter_linear_group"}, "one size in, got []"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    with pytest.raises(ValueError) as refusal:
        artemis_kernels.tune(**{"shapes": [(8, 8, 2)], "rows": [4], **change})
    assert message in str(refusal.value)
    assert not tables.USER_TABLES.exists()


def frozen(kind: str, rows: int, weight, r: int = 8) -> artemis_kernels.Choice:
    """What `frozen_linear` takes for a layer of 64 to 96 features in bf16."""
    read, bias_down = {"lora": (64, None), "folded": (64, r), "plain": (96, r)}[kind]
    adapter = artemis_kernels.FrozenAdapter(
        torch.zeros(r, read, dtype=torch.bfloat16), torch.zeros(96, r, dtype=torch.bfloat16), None,
        None if bias_down is None else torch.zeros(r, dtype=torch.bfloat16),
        activation="identity" if kind == "lora" else "gelu", reads_output=kind == "plain",
    )  # fmt: skip
    x = torch.zeros(rows, 64, dtype=torch.bfloat16)
    return artemis_kernels.explain("frozen_linear", x, weight, adapter)


def test_frozen_linear_asks_its_own_entries():
    """Of its kind of adapter alone, and never those of the operation it freezes."""
    weight = torch.zeros(96, 64, dtype=torch.bfloat16)
    packed = QuantizedWeight.quantize(torch.randn(96, 64), activation_bits=16)
    case = Case("frozen_linear:lora", 32, 64, 96, 8, "bfloat16", "int8:16")
    usual, other = "products_weight_only", "products_weight_only_copy"
    assert frozen("lora", 20, packed).strategy == usual
    tune(lambda case, names: {n: around(1.0 if n == other else 2.0) for n in names}, (case,),
         usual=usual)  # fmt: skip
    choice = frozen("lora", 20, packed)
    assert choice.strategy == other and "tuned: 1 ms against 2 ms" in choice.reason
    for untouched in (
        frozen("folded", 20, packed), frozen("plain", 20, packed), frozen("lora", 33, packed),
        frozen("lora", 20, weight), frozen("lora", 20, packed, r=9),
    ):  # fmt: skip
        assert "tuned" not in untouched.reason


@pytest.mark.skipif(not most_rows_here(torch.bfloat16, "int8"), reason="no pass of few rows here")
def test_few_rows_in_one_call_end_where_the_table_says():
    """`FrozenLinear` takes few rows without asking again, so it asks for each number at first."""
    weight = torch.randn(96, 64).bfloat16()
    adapter = artemis_kernels.FrozenAdapter.lora(torch.randn(8, 64), torch.randn(96, 8),
                                                 dtype=torch.bfloat16)  # fmt: skip
    case = Case("frozen_linear:lora", 4, 64, 96, 8, "bfloat16")
    assert set(candidates(case, None)) == {"one_call", "products"}
    assert rows_in_one_call(artemis_kernels.FrozenLinear(weight, adapter)) == [1, 2, 3, 4, 5, 8]
    tune(lambda case, names: {n: around(1.0 if n == "products" else 2.0) for n in names}, (case,),
         usual="one_call")  # fmt: skip
    assert rows_in_one_call(artemis_kernels.FrozenLinear(weight, adapter)) == [1, 2]
    strategies = [frozen("lora", rows, weight).strategy for rows in (2, 3, 4, 5)]
    assert strategies == ["one_call", "products", "products", "one_call"]


def rows_in_one_call(layer: artemis_kernels.FrozenLinear) -> list[int]:
    """For which numbers of rows a layer calls its pass and nothing else."""
    called, few = [], layer._few_rows
    layer._few_rows = lambda x: called.append(len(x)) or few(x)
    for rows in (1, 2, 3, 4, 5, 8, 9):
        assert layer(torch.randn(rows, 64).bfloat16()).shape == (rows, 96)
    return called


def test_a_weight_that_the_pass_cannot_take_never_gets_it():
    """Though an entry, of a weight that it can, says so."""
    key = Case("frozen_linear:lora", 16, 64, 96, 8, "bfloat16", "int4:16").key
    entry = entry_of("products_weight_only_copy", "products_weight_only",
                     ms={n: [1, 2, 3] for n in ("products_weight_only_copy",
                                                "products_weight_only")})  # fmt: skip
    tables.write(user(), {"strategies": {key: entry}, "tiles": {}})
    tables.reload()
    in_groups_of_32 = QuantizedWeight.quantize(
        torch.randn(96, 64), "int4", group_size=32, activation_bits=16
    )
    assert frozen("lora", 1, in_groups_of_32).strategy == "products_weight_only"
    assert frozen("lora", 16, in_groups_of_32).strategy == "products_weight_only_copy"


@pytest.mark.parametrize(
    ("rows", "usual", "other"),
    [
        (1, "one_call_weight_only", "products_weight_only"),
        (8, "products_weight_only", "one_call_weight_only"),
        (16, "products_weight_only", "products_weight_only_direct"),
    ],
)
def test_a_table_of_a_process_with_compiled_passes_serves_one_without(
    rows, usual, other, monkeypatch
):
    key = Case("frozen_linear:lora", rows, 64, 96, 8, "bfloat16", "int8:16").key
    entry = entry_of(other, usual, ms={other: [1, 2, 3], usual: [2, 3, 4]})
    tables.write(user(), {"strategies": {key: entry}, "tiles": {}})
    monkeypatch.setattr(native, "library", lambda: native.Native(None, "switched off"))
    tables.reload()
    weight = QuantizedWeight.quantize(torch.randn(96, 64), activation_bits=16)
    assert frozen("lora", rows, weight).strategy == "products_weight_only"
    x, eye = torch.randn(3, 4), torch.eye(4)
    assert torch.equal(artemis_kernels.lora_linear(x, 0 * eye, eye, eye, 1.0), x)


@pytest.mark.parametrize(("in_features", "there"), [(96, False), (128, True)])
def test_one_call_is_timed_over_groups_that_its_pass_takes(in_features, there, monkeypatch):
    monkeypatch.setattr(strategies, "has_bf16_rows", lambda: True)
    case = Case("frozen_linear:plain", 1, in_features, 40, 8, "bfloat16", "int4:auto")
    assert ("one_call_weight_only" in candidates(case, None)) == there


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("weight", ["tensor", "int8:auto", "int4:16", "fp8:8"])
def test_choices_are_those_of_dispatch_on_this_cpu(op, weight):
    if (op, weight) == ("quantized_linear", "tensor"):
        return
    sizes = (64, 96, 8)
    for rows in (1, 20, 300):
        shown = artemis_kernels.choices(
            [sizes], [rows], op=op, weight=weight, dtype="float32", trains=False
        )[sizes, rows]
        case = case_of(op, rows, *sizes, "float32", weight, False, False)
        workload = Workload(case, torch.device("cpu"))
        assert (shown.impl, shown.strategy, shown.tiles) == ("eager", workload.usual(), ())
        assert shown.reason.startswith("the tensors are on the CPU")


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("op", OPERATIONS)
def test_choices_on_a_chip_that_is_not_here(op, chip):
    weight = "int8:auto" if op == "quantized_linear" else "tensor"
    for trains in (True, False):
        found = artemis_kernels.choices([(4096, 4096, 64)], [1, 8192], op=op, weight=weight,
                                        trains=trains, device=chip)  # fmt: skip
        for (sizes, rows), one in found.items():
            case = case_of(op, rows, *sizes, "bfloat16", weight, trains, False)
            assert one.impl == "triton" and one.strategy in candidates(case, CHIPS[chip])
            assert all(tile.origin == "default" for tile in one.tiles)
            assert "CPU" not in one.reason


QKV = ((4096, 4096, 16), (4096, 1024, 16), (4096, 1024, 16))


def test_choices_of_a_group_have_the_tiles_of_its_joint_width(capsys):
    """What reads x for all members is of their ranks' sum, what follows one of them of its own."""
    options = {"op": "lora_linear_group", "dropout_p": 0.1, "device": "sm_80"}
    ((key, one),) = artemis_kernels.choices(QKV, [8000], **options).items()
    assert key == (QKV, 8000) and one.strategy == "joined: split + split + split"
    assert "x is read once for all" in one.reason and one.op == "lora_linear_group"
    of_x, of_k = "8192 0 4096 48 bfloat16 masked", "8192 1024 4096 16 bfloat16"
    assert {(tile.kernel, tile.shape) for tile in one.tiles} == {
        ("shrink", of_x), ("shrink_backward", of_x),
        ("expand", "8192 4096 4096 16 bfloat16"), ("expand", of_k),
        ("expand_backward", "8192 4096 0 16 bfloat16"),
        ("expand_backward", "8192 1024 0 16 bfloat16"),
        ("expand", "8192 4096 4096 48 bfloat16 masked"),  # dX: q's, with all low-rank terms
    }  # fmt: skip
    command = ["tune", "--op", "lora_linear_group", "--dropout", "--rows", "8000", "--shapes"]
    command += ["x".join(map(str, shape)) for shape in QKV] + ["--show", "--chip", "sm_80"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert text.startswith("8,000 rows, 4096x4096x16 + 4096x1024x16 + 4096x1024x16: lora_linear_gr")
    assert f"  shrink {of_x}: " in text


def test_choices_of_a_group_whose_members_stay_apart():
    """Of few rows each takes one pass on this chip, so that no launch is joint."""
    ((_, one),) = artemis_kernels.choices(
        QKV, [16], op="lora_linear_group", device="sm_90", trains=False
    ).items()
    assert one.strategy == "each: one_pass + one_pass + one_pass"
    assert not any(" 48 " in tile.shape or " 32 " in tile.shape for tile in one.tiles)


@pytest.mark.parametrize("op", ["lora_linear_group", "adapter_linear_group"])
def test_choices_of_a_group_are_those_of_dispatch_on_this_cpu(op):
    x, weights = torch.zeros(20, 64), [torch.zeros(n, 64) for n in (96, 32)]
    downs = [torch.zeros(8, 64 if op.startswith("lora") else n) for n in (96, 32)]
    ups, more = [torch.zeros(n, 8) for n in (96, 32)], [[1.0, 1.0]] * op.startswith("lora")
    explained = artemis_kernels.explain(op, x, weights, downs, ups, *more)
    ((_, shown),) = artemis_kernels.choices(
        [(64, 96, 8), (64, 32, 8)], [20], op=op, dtype="float32", trains=False
    ).items()
    assert shown[:4] == (op, "eager", explained.strategy, explained.reason)
    assert shown.tiles == ()


def test_a_group_tunes_the_strategies_of_its_members():
    shapes = [(16, 24, 4), (16, 32, 4)]
    found = artemis_kernels.tune(
        shapes, [5], op="adapter_linear_group", dtype="float32", rounds=1, progress=False
    )
    wanted = {case_of("adapter_linear", 8, *shape, "float32", "tensor", True, False).key
              for shape in shapes}  # fmt: skip
    assert set(found["strategies"]) == wanted and not found["tiles"]


def test_shown_tiles_come_from_where_they_say(capsys):
    """A user's entry, over a packed weight, is shown and named; others stay the default."""
    chip, shape = HOPPER, Shape(16, 512, 1024, dtype=torch.bfloat16)
    usual = tiling.heuristic("weight_only_int8", shape, chip)
    chosen = replace(usual, block_n=2 * usual.block_n, warps=8)
    entry = entry_of(asdict(chosen), asdict(usual), ms={"chosen": [1] * 3, "usual": [2] * 3})
    tables.write(user(chip), {"strategies": {}, "tiles": {f"weight_only_int8 {shape.key}": entry}})
    tables.reload()
    command = ["tune", "--op", "quantized_linear", "--weight", "int8:auto", "--rows", "10"]
    command += ["--shapes", "1024x512x1", "--inference", "--show", "--chip"]
    assert main([*command, "sm_90"]) == 0
    text = capsys.readouterr().out
    assert f"block_n {chosen.block_n}" in text and "(the user's table)" in text
    assert main([*command, "sm_80"]) == 0
    text = capsys.readouterr().out
    assert "(default)" in text and "user's" not in text
    assert main([*command, "sm_90", "--json"]) == 0
    ((one,),) = (each["tiles"] for each in json.loads(capsys.readouterr().out).values())
    assert one["origin"] == "user's" and tiling.Config(**one["config"]) == chosen
    assert one["kernel"] == "weight_only_int8" and one["shape"] == shape.key


def test_a_chip_is_for_showing(capsys):
    command = ["tune", "--shapes", "16x24x4", "--rows", "5"]
    assert main([*command, "--chip", "sm_90"]) == 1
    assert "add --show" in capsys.readouterr().err
    assert main([*command, "--show", "--chip", "h100"]) == 1
    assert "'sm_90'" in capsys.readouterr().err
    assert main([*command, "--show"]) == 0
    assert "default" not in capsys.readouterr().out  # a CPU has no tiles
