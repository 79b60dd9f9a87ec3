"""The harness itself: arms train what they say, the gate sees faults, tables follow results."""

import json
import re

import pytest
import torch

from artemis.benchmark.arms import TrainingStep
from bench import accuracy, profile_step, report, train_step
from bench.cases import PRESETS, Case
from bench.floors import Site, adapter_products
from bench.providers import ARMS
from bench.targets import Ratio

TINY = Case(hidden=64, intermediate=96, layers=2, vocabulary=96, batch=2, sequence=16)


@pytest.mark.parametrize("path", ARMS)
def test_an_arm_trains_what_it_says(path: str):
    step = ARMS[path].make(TINY)
    if not isinstance(step, TrainingStep):
        step()
        return
    names = {name for name, p in step.model.named_parameters() if p.requires_grad}
    weights = {p: p.detach().clone() for p in step.model.parameters()}
    step()
    changed = {n for n, p in step.model.named_parameters() if not torch.equal(p, weights[p])}
    assert changed <= names
    if "full" in path:  # in bf16, 1.0 + 1e-4 is 1.0: norms stand still
        assert changed >= {name for name in names if "norm" not in name}
    elif path.endswith("floor"):
        assert not names
    else:  # B (or up) first, of every site: A (or down) has no gradient while they are zero
        sites = [n for n in changed if ".lora_B." in n or ".lora_b." in n or ".up." in n]
        assert len(sites) in (7 * TINY.layers, 4 * TINY.layers + 3)


def test_the_floor_reaches_the_first_projections_and_no_weight():
    step = ARMS["fp32/floor"].make(TINY)
    seen = []
    attention = step.model.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.register_forward_hook(lambda m, a, y: y.register_hook(seen.append) and None)
    step.backward()
    assert len(seen) == 3 and all(gradient.any() for gradient in seen)
    assert all(p.grad is None for p in step.model.parameters())


@pytest.mark.parametrize(
    ("site", "allowed"),
    [
        (Site("lora", 24, 40, 8, needs_dx=True), {3 * 8 * 32 * (24 + 40)}),
        (Site("lora", 24, 40, 8, needs_dx=False), {8 * 32 * (2 * 24 + 3 * 40)}),
        # plain, or folded: either may be faster
        (
            Site("bottleneck", 24, 40, 8, needs_dx=True),
            {6 * 8 * 32 * 40, 3 * 8 * 32 * (24 + 40) + 2 * 8 * 24 * 40},
        ),
    ],
)
def test_the_bare_products_are_those_of_the_adapters(site: Site, allowed: set[int]):
    run = adapter_products([site], 32, torch.float32)
    with torch.profiler.profile(record_shapes=True) as profiler:
        run()
    shapes = [event.input_shapes for event in profiler.events() if event.name == "aten::mm"]
    multiply_adds = sum(left[0] * left[1] * right[1] for left, right, *_ in shapes)
    assert multiply_adds in allowed


@pytest.mark.parametrize("path", ["fp32/peft", "fp32/hybrid", "bf16/lora-dropout"])
def test_the_gate_passes_a_right_arm(path: str):
    arm = ARMS[path]
    assert accuracy.check(arm.make(TINY), arm, TINY).passed


@pytest.mark.parametrize("fault", [1.001, float("nan")])
def test_the_gate_sees_a_wrong_gradient(fault: float):
    truth = {f"lora_{i}:{path}": torch.randn(8, 32).double() for i in "ab" for path in "xyz"}
    rounding = {name: t.float().double() for name, t in truth.items()}
    assert accuracy.compare(rounding, rounding, truth, 1e-7).passed
    wrong = rounding | {"lora_b:y": rounding["lora_b:y"] * fault}
    verdict = accuracy.compare(wrong, rounding, truth, 1e-7)
    assert not verdict.passed and verdict.role == "lora_b"


def test_a_ratio_is_formed_within_rounds_and_sides_add_up():
    times = {"slow": [2.0, 8.0, 3.0], "base": [0.5, 3.0, 1.0], "extra": [0.5, 1.0, 0.5]}
    ratio = Ratio("r", ("slow",), ("base", "extra"), at_least=2.0)
    assert ratio.measured(times).p50 == 2.0
    assert ratio.met(2.0) is True and ratio.met(1.99) is False
    assert ratio.measured({"slow": [1.0]}) is None


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="tokens: got 100"):
        PRESETS["512x8"].resized(None, None, 100)
    assert PRESETS["512x8"].resized(768, None, 256).intermediate == 2048


def test_a_run_ends_in_tables(tmp_path, capsys):
    sizes = ["--hidden", "64", "--layers", "1", "--tokens", "128"]
    out = tmp_path / "steps.jsonl"
    arms = ["--arms", "fp32/full", "fp32/floor", "fp32/products", "fp32/hybrid"]
    assert train_step.main([*sizes, *arms, "--rounds", "2", "--out", str(out)]) == 0
    assert profile_step.main([*sizes, "--steps", "1", "--out", str(out)]) == 0
    assert "own floor" in capsys.readouterr().out
    records = [json.loads(line) for line in out.read_text().splitlines()]
    names = report.SECTIONS
    marked = "".join(f"<!-- begin: {n} -->\n<!-- end: {n} -->\n" for n in names)
    document = report.filled(marked, records)
    assert report.filled(document, records) == document
    assert "| default hybrid |" in document and "| adapter products |" in document
    later = [dict(r) for r in records if r["kind"] != "profile"]
    for record in later:
        record["run"] = "later"
        if record["kind"] == "arm":
            record["ms"] = {"p50": 123456.0, "p20": 1.0, "p80": 1.0}
    renewed = report.filled(document, records + later)
    assert "123,456" in renewed and len(renewed.splitlines()) == len(document.splitlines())


def test_decoding_ends_in_a_table():
    """What `artemis bench decode --resume` wrote, as the documents show it: the last counts."""
    head = {
        "kind": "run", "run": "1", "processor": {"name": "cpu", "flags": ["avx2"]}, "threads": 2,
        "versions": {"torch": "2.13"}, "dirty": False, "commit": "abc", "time": "2026-01-01T00:00",
        "device": "cpu",
    }  # fmt: skip

    def row(arm, prompt, speed):
        phase = {"tokens_per_second": 1000 * speed, "speedup": {"full-bf16": speed}}
        return {
            "kind": "row", "table": "decode", "run": "1", "model": "2048x2", "tokens": prompt,
            "sequence": prompt, "batch": 1, "how": "measured whole", "arm": arm, "what": arm,
            "prefill": phase, "decode": phase,
        }  # fmt: skip

    records = [
        head, row("hybrid-int4", 1024, 3.0), row("full-bf16", 128, 1.0),
        row("hybrid-int4", 128, 9.0), row("hybrid-int4", 128, 2.5),
    ]  # fmt: skip
    document = report.filled("<!-- begin: bench-decode -->\n<!-- end: bench-decode -->", records)
    lines = [line for line in document.splitlines() if re.match(r"\| (full|hybrid)", line)]
    arms = [line.split(" | ")[0].strip("| ") for line in lines]
    assert arms == ["full-bf16", "hybrid-int4", "hybrid-int4"]
    assert "2.50" in lines[1] and "3.00" in lines[2] and "9.00" not in document
