"""The search for tiles, with a timer that is told what to find; no GPU takes part."""

from dataclasses import replace

import pytest
import torch

from artemis_kernels.core import tables, tiling
from artemis_kernels.core.device import CHIPS
from artemis_kernels.core.strategies import Case
from artemis_kernels.core.tiling import Shape
from artemis_kernels.tuner import launches, tiles
from artemis_kernels.tuner.tiles import Resources

HOPPER = CHIPS["sm_90"]
SHAPE = Shape(8192, 4096, 4096, 16)
CASES = (
    Case("lora_linear", 8192, 4096, 1024, 16, "bfloat16", trains=True, drops=True),
    Case("adapter_linear", 1024, 4096, 4096, 64, "bfloat16", trains=True),
    Case("bottleneck_adapter", 16384, 0, 2048, 64, "bfloat16", trains=True),
    Case("lora_linear", 16, 4096, 1024, 16, "bfloat16"),
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
    assert tables.tiles("expand", SHAPE, HOPPER) == chosen
    tables.reload()


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_nothing_over_a_limit_is_even_compiled(chip):
    chip = CHIPS[chip]
    for kernel, shape in launches.of_cases(CASES, chip):
        found = tiles.likely(kernel, shape, chip)
        assert len(found) <= tiles.MOST_COMPILED
        for config in found:
            assert tiling.is_legal(config)
            assert tiles.staged_bytes(kernel, shape, config) <= chip.shared_bytes


def test_what_does_not_compile_within_the_chip_is_never_timed(tmp_path):
    """Spilled registers, or more shared memory than the chip has."""
    refused, timed = [], []

    def resources(kernel, shape, config):
        if config.stages == 2:
            refused.append(config)
            return Resources(HOPPER.shared_bytes + 1, 0)
        if config.warps == 4:
            refused.append(config)
            return Resources(1024, 8)
        return Resources(HOPPER.shared_bytes, 0)

    def measure(kernel, shape, configs):
        timed.extend(configs[1:])  # the first is the usual one
        return {config: [1.0, 1.0, 1.0] for config in configs}

    tune(tmp_path / "sm_90.json", measure, resources)
    assert refused and timed and not set(refused) & set(timed)


def test_an_interrupted_search_goes_on(tmp_path):
    wanted = (("expand", SHAPE), ("shrink", replace(SHAPE, n=0)))
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


def test_the_cost_model_counts_padding_waves_and_reads():
    usual = tiling.heuristic("expand", SHAPE, HOPPER)

    def cost(shape=SHAPE, **change):
        return tiles.cost("expand", shape, replace(usual, **change), HOPPER)

    assert cost(block_m=16, block_n=16) > 2 * cost()  # reads again
    half_empty, full = (cost(replace(SHAPE, m=m), block_m=256) for m in (300, 512))
    assert half_empty > 1.5 * full  # padding
    few = replace(SHAPE, m=128, n=1024)
    assert cost(few, block_n=256) > cost(few, block_n=64)  # unfilled waves


def test_launches_look_up_what_the_fused_paths_look_up(monkeypatch):
    """The shapes that are tuned are those that a call asks for."""
    from artemis_kernels.core import tuning
    from artemis_kernels.tuner.workload import Workload

    case = Case("lora_linear", 32, 64, 48, 8, "float32", trains=True)
    asked = set()

    def recorded(kernel, shape, on):
        asked.add((kernel, shape))
        return tiling.heuristic(kernel, shape, on)

    monkeypatch.setattr(tuning, "config", recorded)
    workload = Workload(case, torch.device("cpu"))
    workload.impl = "triton"
    for strategy in ("one_pass", "split", "vendor"):
        workload.run(strategy, 0)
    assert asked == set(launches.of_cases([case], CHIPS["interpreter"]))


@pytest.mark.parametrize("kernel", launches.LAUNCHERS)
def test_every_launcher_launches(kernel):
    chip, shape = CHIPS["interpreter"], Shape(32, 32, 32, 8, torch.float32)
    shape = replace(shape, n=0) if kernel == "row_block" else shape

    def new(*sizes, dtype=torch.float32):
        return torch.zeros(sizes, dtype=dtype)

    launches.launcher(kernel, shape, chip, new)(tiling.heuristic(kernel, shape, chip))


def test_the_whole_search_runs(tmp_path, monkeypatch):
    """Every kernel of a few cases launched with several tiles, and timed, in the interpreter."""
    monkeypatch.setattr(tiles, "MOST_COMPILED", 1)
    monkeypatch.setattr(tiles, "compiled_resources", lambda *a: Resources(0, 0))
    cases = [
        Case("lora_linear", 16, 32, 48, 8, "float32", trains=True),
        Case("bottleneck_adapter", 16, 0, 32, 8, "float32"),
    ]
    chip, path = CHIPS["interpreter"], tmp_path / "interpreter.json"
    found = tiles.search(cases, path, chip, torch.device("cpu"), rounds=1, progress=False)
    assert {key.partition(" ")[0] for key in found} == set(launches.LAUNCHERS)
    assert tables.read(path, chip)["tiles"] == found
