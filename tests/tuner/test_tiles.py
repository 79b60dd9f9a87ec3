"""The search for tiles, with a timer that is told what to find; no GPU takes part."""

from dataclasses import replace

import pytest
import torch
from triton.compiler import CompilationError
from triton.runtime.errors import OutOfResources

from artemis_kernels.core import tables, tiling
from artemis_kernels.core.device import CHIPS
from artemis_kernels.core.strategies import Case, candidates
from artemis_kernels.core.tiling import Shape
from artemis_kernels.tuner import launches, lookups, tiles
from artemis_kernels.tuner.tiles import Resources

HOPPER = CHIPS["sm_90"]
SHAPE = Shape(8192, 4096, 4096, 16)
SINGLE, HALF = torch.float32, torch.float16
CASES = (
    Case("lora_linear", 8192, 4096, 1024, 16, "bfloat16", trains=True, drops=True),
    Case("adapter_linear", 1024, 4096, 4096, 64, "bfloat16", trains=True),
    Case("bottleneck_adapter", 16384, 0, 2048, 64, "bfloat16", trains=True),
    Case("lora_linear", 16, 4096, 1024, 16, "bfloat16"),
    Case("adapter_linear", 8192, 4096, 4096, 64, "bfloat16", "int8:auto", trains=True),
    Case("lora_linear", 16, 4096, 1024, 16, "bfloat16", "int4:16"),
    Case("quantized_linear", 8192, 4096, 4096, 0, "bfloat16", "fp8:8", trains=True),
)


def fits(kernel, shape, config):
    return Resources(1024, 0)


def tune(path, measure, resources=fits, wanted=(("expand", SHAPE),)):
    return tiles.tune_each(
        list(wanted), path, HOPPER, resources=resources, measure=measure, rounds=3, progress=False
    )


def test_the_winner_is_kept_and_read(tmp_path, monkeypatch):
    usual = tiling.heuristic("expand", SHAPE, HOPPER)

    def measure(kernel, shape, configs):
        assert configs[0] == usual and len(set(configs)) == len(configs) > 5
        return {c: [1.0, 1.0, 1.0] if c == configs[3] else [2.0, 2.0, 2.0] for c in configs}

    found = tune(tmp_path / "sm_90.json", measure)
    (entry,) = found.values()
    assert tiling.Config(**entry["usual"]) == usual
    chosen = tiling.Config(**entry["chosen"])
    assert chosen != usual and entry["ms"] == {"chosen": [1.0] * 3, "usual": [2.0] * 3}
    monkeypatch.setattr(tables, "USER_TABLES", tmp_path)
    tables.reload()
    assert tables.tiles("expand", SHAPE, HOPPER) == (chosen, "user's")
    tables.reload()


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_nothing_over_a_limit_is_even_compiled(chip):
    chip = CHIPS[chip]
    for kernel, shape in lookups.of_calls([(case,) for case in CASES], chip):
        found = tiles.likely(kernel, shape, chip)
        assert len(found) <= tiles.MOST_COMPILED
        for config in found:
            assert tiling.is_legal(kernel, config)
            assert tiles.staged_bytes(kernel, shape, config) <= chip.shared_bytes


ODD = [Shape(m, 50257, 768, 16, dtype) for m in (1, 8192) for dtype in (SINGLE, HALF)]


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kernel", launches.LAUNCHERS)
def test_tiles_worth_compiling_hold_what_a_dot_takes(kernel, chip):
    """NVIDIA's tensor cores: 16 numbers of 16 or 32 bits, 32 of 8; a step of int4 is two dots."""
    if kernel.startswith("matvec"):
        pytest.skip("there is no dot in it")
    dots = {"eight_bit_int8": 32, "eight_bit_fp8": 32, "weight_only_int4": 2 * 16}
    for shape in (*ODD, SHAPE, SHAPE._replace(m=1)):
        for config in tiles.likely(kernel, shape, CHIPS[chip]):
            sizes = (config.block_m, config.block_n, config.block_k, config.block_r)
            if not kernel.startswith("round_rows"):  # which has no dot
                assert all(size == 0 or size >= 16 for size in sizes)
            assert config.block_k == 0 or config.block_k >= dots.get(kernel, 16)


def test_a_weight_is_transposed_where_tensor_cores_ask_for_it():
    """For dX in 8 bits, on NVIDIA's chips; the shape is the weight's, whatever rows there are."""
    case = Case("quantized_linear", 8192, 4096, 11008, 0, "float16", "fp8:8", trains=True)
    looks = {name: lookups.of_calls([(case,)], CHIPS[name]) for name in ("sm_90", "gfx950")}
    found = {name: [one for one in each if "transpose" in one[0]] for name, each in looks.items()}
    assert found == {"sm_90": [("transpose_fp8", Shape(1, 11008, 4096))], "gfx950": []}
    assert "round_rows_fp8" in dict(looks["gfx950"])


def test_what_does_not_compile_within_the_chip_is_never_timed(tmp_path):
    """Spilled registers, or more shared or tensor memory than the chip has."""
    refused, timed = [], []

    def resources(kernel, shape, config):
        if config.stages == 2:
            refused.append(config)
            return Resources(HOPPER.shared_bytes + 1, 0)
        if config.warps == 4:
            refused.append(config)
            return Resources(1024, 8)
        if config.block_k == 32:
            refused.append(config)
            return Resources(1024, 0, 513)
        return Resources(HOPPER.shared_bytes, 0, 512)

    def measure(kernel, shape, configs):
        timed.extend(configs[1:])  # the first is the usual one
        return {config: [1.0, 1.0, 1.0] for config in configs}

    tune(tmp_path / "sm_90.json", measure, resources)
    assert refused and timed and not set(refused) & set(timed)


def test_what_triton_makes_no_code_of_is_never_timed(tmp_path):
    """A search goes on past a compiler's refusal; a bug that raises anything else ends it."""
    timed = []

    def resources(kernel, shape, config):
        if config.warps == 4:
            raise CompilationError("", None, "Input shapes should have K >= 32")
        return Resources(1024, 0)

    def measure(kernel, shape, configs):
        timed.extend(configs)
        return {config: [1.0, 1.0, 1.0] for config in configs}

    assert tune(tmp_path / "sm_90.json", measure, resources)
    assert len(timed) > 1 and all(config.warps == 8 for config in timed)

    def broken(kernel, shape, config):
        raise TypeError("no such argument")

    with pytest.raises(TypeError):
        tune(tmp_path / "other.json", measure, broken)


@pytest.mark.parametrize("needed", [OutOfResources(2, 1, "shared memory"), HOPPER.shared_bytes + 1])
def test_default_tiles_that_do_not_run_leave_no_entry(tmp_path, needed):
    def resources(kernel, shape, config):
        if isinstance(needed, int):
            return Resources(needed, 0)
        raise needed

    with pytest.warns(UserWarning, match="default tiles of 'expand 8192 .* do not run on sm_90"):
        assert not tune(tmp_path / "sm_90.json", pytest.fail, resources)


def test_candidates_are_compiled_ahead_of_what_is_timed(tmp_path):
    """By a pool's `map`: at most so many a kernel, in the order of lookups."""
    wanted = (("expand", SHAPE), ("shrink", SHAPE._replace(n=0)))
    compiled, behind = [], []

    def resources(kernel, shape, config):
        compiled.append(kernel)
        return None if len(compiled) == 2 else Resources(1024, 0)  # one of them is no code

    def ahead(function, configs):
        return iter([function(config) for config in configs])

    def measure(kernel, shape, configs):
        behind.append((kernel, len(configs), len(compiled)))
        return {config: [1.0, 1.0, 1.0] for config in configs}

    found = tiles.tune_each(
        list(wanted), tmp_path / "sm_90.json", HOPPER, resources=resources, measure=measure,
        rounds=3, progress=False, mapped=ahead, most=4,
    )  # fmt: skip
    assert len(found) == 2 and len(compiled) <= 2 * 5
    assert [kernel for kernel, _, _ in behind] == ["expand", "shrink"]
    assert all(ready == len(compiled) for _, _, ready in behind)
    expand = compiled.count("expand")
    assert behind[0][1] == expand - 1 and compiled == ["expand"] * expand + ["shrink"] * (
        len(compiled) - expand
    )


def test_an_interrupted_search_goes_on(tmp_path):
    wanted = (("expand", SHAPE), ("shrink", SHAPE._replace(n=0)))
    timed = []

    def interrupted(kernel, shape, configs):
        timed.append(kernel)
        if timed == ["expand", "shrink"]:
            raise KeyboardInterrupt
        return {config: [1.0, 1.0, 1.0] for config in configs}

    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "sm_90.json", interrupted, wanted=wanted)
    assert len(tune(tmp_path / "sm_90.json", interrupted, wanted=wanted)) == 2
    assert timed == ["expand", "shrink", "shrink"]


def test_a_changed_default_is_measured_anew(tmp_path):
    """Dispatch has left the entry that beat the former one."""
    path, timed = tmp_path / "sm_90.json", []

    def measure(kernel, shape, configs):
        timed.append(configs[0])
        return {config: [1.0, 1.0, 1.0] for config in configs}

    tune(path, measure)
    table = tables.read(path, HOPPER)
    (entry,) = table["tiles"].values()
    entry["usual"]["stages"] += 1
    tables.write(path, table)
    assert tune(path, measure) == tune(path, measure)
    assert timed == 2 * [tiling.heuristic("expand", SHAPE, HOPPER)]


def test_the_cost_model_counts_padding_waves_and_reads():
    usual = tiling.heuristic("expand", SHAPE, HOPPER)

    def cost(shape=SHAPE, **change):
        return tiles.cost("expand", shape, replace(usual, **change), HOPPER)

    assert cost(block_m=16, block_n=16) > 2 * cost()  # reads again
    half_empty, full = (cost(SHAPE._replace(m=m), block_m=256) for m in (300, 512))
    assert half_empty > 1.5 * full  # padding
    few = SHAPE._replace(m=128, n=1024)
    assert cost(few, block_n=256) > cost(few, block_n=64)  # unfilled waves


@pytest.mark.parametrize(("width", "twice"), [(16, False), (64, True)])
def test_where_dy_is_read_twice_other_tiles_are_tuned(width, twice):
    case = Case("lora_linear", 8192, 4096, 11008, width, "bfloat16", trains=True)
    found = dict.fromkeys(lookups.of_strategy(case, "vendor", HOPPER))
    once, again = Shape(8192, 11008, r=width), Shape(8192, k=11008, r=width)
    assert (("expand_backward", once) in found) is not twice
    assert (("shrink_backward", again) in found) is (("shrink", again) in found) is twice


WORK = [
    Case(
        op, 32, 0 if op == "bottleneck_adapter" else 64, 48, width, "float32", weight, trains, drops
    )
    for op, weight, width, trains, drops in (
        ("lora_linear", "tensor", 8, True, False),
        ("lora_linear", "tensor", 70, True, True),
        ("lora_linear", "int8:auto", 8, True, True),
        ("lora_linear", "int4:16", 8, False, False),
        ("adapter_linear", "tensor", 8, True, True),
        ("adapter_linear", "tensor", 70, False, False),
        ("adapter_linear", "int8:auto", 8, True, True),
        ("bottleneck_adapter", "tensor", 8, True, True),
        ("bottleneck_adapter", "tensor", 8, False, False),
        ("quantized_linear", "fp8:auto", 0, True, False),
        ("frozen_linear:lora", "tensor", 8, False, False),
        ("frozen_linear:folded", "int8:auto", 8, False, False),
        ("frozen_linear:plain", "int4:16", 8, False, False),
        ("frozen_linear:plain", "tensor", 8, False, False),
    )
]


#: The same with so few rows that there are kernels for them; beyond a rank there are not.
WORK += [case._replace(rows=4) for case in WORK]
WORK += [Case("lora_linear", 4, 64, 48, 200, "float32", weight) for weight in ("tensor", "fp8:16")]


@pytest.mark.parametrize("case", WORK, ids=lambda case: case.key)
def test_lookups_are_those_of_the_fused_paths(case, monkeypatch):
    """What is tuned and shown is what each strategy asks for, no more and no less."""
    from artemis_kernels.core import tuning
    from artemis_kernels.tuner.workload import Workload

    chip, asked = CHIPS["interpreter"], set()

    def recorded(kernel, shape, on):
        asked.add((kernel, shape))
        return tiling.heuristic(kernel, shape, on)

    monkeypatch.setattr(tuning, "config", recorded)
    workload = Workload(case, torch.device("cpu"))
    workload.impl = "triton"
    names = candidates(case, chip)
    assert workload.usual() in names
    for strategy in names:
        asked.clear()
        workload.run(strategy, 0)
        assert asked == set(lookups.of_strategy(case, strategy, chip)), strategy
    every = lookups.of_calls([(case,)], chip)
    assert len(every) == len(set(every)) and asked <= set(every)


def group(op: str, weight: str, trains: bool, drops: bool, *members: tuple[int, int]):
    """Members of a group, each (out, width)."""
    return tuple(
        Case(op, 32, 64, n, r, "float32", weight, trains, drops) for n, r in members
    )  # fmt: skip


GROUPS = [
    group("lora_linear", "tensor", True, True, (48, 8), (80, 8), (48, 70)),
    group("lora_linear", "int8:auto", True, True, (48, 8), (80, 20)),
    group("lora_linear", "int4:16", False, False, (48, 8), (48, 8)),
    group("adapter_linear", "tensor", True, True, (48, 8), (80, 70)),
    group("adapter_linear", "int8:auto", True, False, (48, 8), (48, 8)),
    group("adapter_linear", "tensor", False, True, (48, 8), (80, 20)),
]
GROUPS += [tuple(case._replace(rows=4) for case in members) for members in GROUPS]


def run_group(members: tuple[Case, ...], strategies: tuple[str, ...]) -> None:
    """The operator of a group by these strategies, on operands of its members' workloads."""
    from artemis_kernels.tuner.workload import Workload

    loads = [Workload(case, torch.device("cpu")) for case in members]
    parts = []
    for load in loads:
        weight, (down, up, bias_down, bias_up) = load.weights[0], load.small
        packed = load.case.format != "tensor"
        small = [None] if load.case.op == "lora_linear" else [None, bias_down, bias_up]
        parts += [weight.data if packed else weight, down, up, *small, None]
        parts += [weight.scale, weight.offset] if packed else [None, None]
    first, ones = loads[0], [1.0] * len(loads)
    operator = getattr(torch.ops.artemis, f"{first.case.op}_group")
    with torch.set_grad_enabled(first.case.trains):
        ys = operator(first.x, parts, ones, "gelu", *first.dropout, "triton", strategies)
        if first.case.trains:
            learning = [first.x, *(small for load in loads for small in load.learning[1:])]
            torch.autograd.grad(ys, learning, [load.dy for load in loads])


def mixed(members: tuple[Case, ...], chip) -> list[tuple[str, ...]]:
    """Strategies of the members: all of them alike, and each one step on from the last."""
    names = [candidates(case, chip) for case in members]
    return [
        tuple(each[(turn + place * step) % len(each)] for place, each in enumerate(names))
        for step in (0, 1)
        for turn in range(len(names[0]))
    ]


@pytest.mark.parametrize("members", GROUPS, ids=lambda members: members[0].key)
def test_lookups_of_groups_are_those_of_their_operators(members, monkeypatch):
    """At the joint width, whatever strategy each member takes; one pass keeps members apart."""
    from artemis_kernels.core import tuning

    chip, asked = CHIPS["interpreter"], set()

    def recorded(kernel, shape, on):
        asked.add((kernel, shape))
        return tiling.heuristic(kernel, shape, on)

    monkeypatch.setattr(tuning, "config", recorded)
    every = lookups.of_calls([members], chip)
    assert len(every) == len(set(every))
    for strategies in mixed(members, chip):
        shown = set(lookups.of_call(members, strategies, chip))
        if "one_pass" in strategies:
            alone = zip(members, strategies, strict=True)
            assert shown == {look for pair in alone for look in lookups.of_strategy(*pair, chip)}
        else:
            asked.clear()
            run_group(members, strategies)
            assert asked == shown, strategies
        assert shown <= set(every)


@pytest.mark.parametrize("kernel", launches.LAUNCHERS)
def test_every_launcher_launches(kernel):
    chip, shape = CHIPS["interpreter"], Shape(32, 32, 32, 8, torch.float32)

    def new(*sizes, dtype=torch.float32):
        return torch.zeros(sizes, dtype=dtype)

    launches.launcher(kernel, shape, chip, new)(tiling.heuristic(kernel, shape, chip))


def test_the_whole_search_runs(tmp_path, monkeypatch):
    """Every kernel of a few cases launched with several tiles, and timed, in the interpreter."""
    monkeypatch.setattr(tiles, "MOST_COMPILED", 1)
    monkeypatch.setattr(tiles, "compiled_resources", lambda *a: Resources(0, 0))
    cases = [
        Case("lora_linear", 16, 32, 48, 8, "float32", trains=True),
        Case("bottleneck_adapter", 16, 0, 32, 8, "float32", trains=True),
        Case("lora_linear", 16, 32, 48, 8, "float32", "int8:auto", trains=True),
        Case("quantized_linear", 16, 32, 48, 0, "float32", "fp8:auto", trains=True),
        Case("lora_linear", 16, 32, 48, 8, "float32", "int4:16"),
        *(
            Case("frozen_linear:lora", 4, 32, 48, 8, "float32", weight)
            for weight in ("tensor", "int8:16", "fp8:16", "int4:16")
        ),
    ]
    chip, path = CHIPS["interpreter"], tmp_path / "interpreter.json"
    calls = [(case,) for case in cases]
    found = tiles.search(
        calls, path, chip, torch.device("cpu"), rounds=1, progress=False, workers=1
    )  # fmt: skip
    assert {key.partition(" ")[0] for key in found} == set(launches.LAUNCHERS) - {
        "finish_product_int8", "finish_product_fp8",  # torch's products: not in the interpreter
    }  # fmt: skip
    assert tables.read(path, chip)["tiles"] == found
