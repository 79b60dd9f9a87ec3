"""The study of compute to equal loss: what it trains, that it resumes, and what its table says."""

from dataclasses import replace

import pytest
import torch

from artemis.benchmark.records import read
from artemis.cli.demo import stages
from artemis.cli.demo.recipe import QUICK, Workspace
from bench import equal_loss as study
from bench import equal_loss_tables as tables

PLAN = study.Plan(
    trial_steps=2, full_steps=4, hybrid_steps=6, every=2, warmup=1, held_out_blocks=3, rounds=2
)
RATES = {"full-autocast": (1e-3, 1e-2), "hybrid": (1e-2, 3e-2), "hybrid-int8": (1e-2,)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equal")
    space, out = Workspace(folder, QUICK), folder / "out.jsonl"
    stages.base(space)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "RATES", RATES)
        run = study.Study(space, out, PLAN)
        run.curves(1)
        run.times()
        yield space, out


def test_every_arm_is_tried_at_every_rate_and_judged_at_its_best(measured):
    _, out = measured
    curves = [record for record in read(out) if record["kind"] == study.CURVE]
    trials = {(r["arm"], r["rate"]) for r in curves if r["seed"] == study.TRIAL_SEED}
    assert trials == {(arm, rate) for arm, rates in RATES.items() for rate in rates}
    for arm in RATES:
        (judged,) = [r for r in curves if r["arm"] == arm and r["seed"] == 0]
        best = min(
            (r for r in curves if r["arm"] == arm and r["seed"] == study.TRIAL_SEED),
            key=lambda r: sum(loss for _, loss in r["curve"]),
        )
        assert judged["rate"] == best["rate"]
        steps = 4 if arm == "full-autocast" else 6
        assert [step for step, _ in judged["curve"]] == list(range(0, steps + 1, 2))
        assert judged["curve"][-1][1] < judged["curve"][0][1]


def test_rates_are_chosen_by_text_that_nothing_is_judged_by(measured):
    space, out = measured
    model, _ = study.load_base(str(space.base), torch.float32)
    losses = []
    for chooses in (True, False):
        blocks = study.held_out_text(space, PLAN, chooses).blocks.long()
        assert blocks.shape == (3, QUICK.sequence_length)
        losses.append(model.eval()(input_ids=blocks, labels=blocks).loss.item())
    curves = [r for r in read(out) if r["kind"] == study.CURVE and r["arm"] == "full-autocast"]
    for record in curves:  # before the first step: the base
        expected = losses[record["seed"] != study.TRIAL_SEED]
        assert record["curve"][0][1] == pytest.approx(expected, rel=1e-3)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_every_point_is_the_end_of_a_shorter_run(measured):
    space, out = measured
    (long,) = [
        r for r in read(out) if r["kind"] == study.CURVE and r["arm"] == "hybrid" and not r["seed"]
    ]
    short = study.train(space, replace(PLAN, hybrid_steps=4), "hybrid", long["rate"], 0)
    assert [list(point) for point in short] == long["curve"][:3]


def test_what_is_known_is_not_measured_again(measured):
    space, out = measured
    before = out.read_text()
    again = study.Study(space, out, PLAN)
    again.curves(1)
    again.times()
    assert out.read_text() == before


def test_steps_and_flops_are_those_of_the_arms(measured):
    _, out = measured
    found = {r["arm"]: r for r in read(out) if r["kind"] == study.STEP}
    assert set(found) == set(RATES)
    assert all(0 < r["ms"]["p20"] <= r["ms"]["p50"] <= r["ms"]["p80"] for r in found.values())
    tokens, weights = QUICK.batch_size * QUICK.sequence_length, 257 * QUICK.hidden_size
    weights += (
        QUICK.layers * QUICK.hidden_size * (4 * QUICK.hidden_size + 3 * QUICK.intermediate_size)
    )
    attention = 12 * QUICK.layers * tokens * QUICK.sequence_length * QUICK.hidden_size
    counted = 6 * tokens * weights + attention  # and, in older transformers, the angles' product
    assert found["full-autocast"]["flops"] == pytest.approx(counted, rel=1e-4)


def curve(arm: str, seed: int, losses: list[float], rate: float = 1.0) -> dict:
    points = [[10 * number, loss] for number, loss in enumerate(losses)]
    return {
        "kind": study.CURVE,
        "run": "r",
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "curve": points,
    }


def test_the_first_time_that_a_level_is_reached_counts():
    points = curve("hybrid", 0, [3.0, 2.0, 2.5, 1.0])["curve"]
    assert tables.steps_to(points, 2.5) == pytest.approx(5)
    assert tables.steps_to(points, 1.75) == pytest.approx(25)
    assert tables.steps_to(points, 3.0) == 0
    assert tables.steps_to(points, 0.9) is None


def test_the_table_is_about_compute_to_equal_loss(monkeypatch):
    monkeypatch.setattr(tables, "RATES", dict.fromkeys(RATES, (1.0,)))
    monkeypatch.setattr(study, "RATES", dict.fromkeys(RATES, (1.0,)))
    head = {
        "kind": "run", "run": "r", "processor": {"name": "chip"}, "threads": 1,
        "time": "2026-01-01", "versions": {"torch": "2"}, "plan": {"rounds": 5},
        "recipe": dict(hidden_size=8, layers=1, batch_size=4, sequence_length=8),
    }  # fmt: skip
    trials = [curve(arm, study.TRIAL_SEED, [3.0, 2.0]) for arm in RATES]
    full, slow = [3.0, 2.0, 1.0], [3.0, 2.5, 2.0, 1.8, 1.5]
    seeds = [
        *(curve("full-autocast", seed, full) for seed in (0, 1)),
        *(curve("hybrid", seed, slow) for seed in (0, 1)),
        curve("hybrid-int8", 0, slow), curve("hybrid-int8", 1, [3.0, 2.5, 2.0, 1.8, 1.6]),
    ]  # fmt: skip
    ms = {"full-autocast": (100.0, 1000), "hybrid": (50.0, 700), "hybrid-int8": (25.0, 700)}
    steps = [
        {"kind": study.STEP, "run": "r", "arm": arm, "ms": {"p50": time}, "flops": flops}
        for arm, (time, flops) in ms.items()
    ]
    rows = tables.table([head, *trials, *seeds, *steps]).splitlines()
    cells = [row[2:-2].split(" | ") for row in rows if row.startswith("| ")]
    found = {first: [first, *rest] for first, *rest in cells}
    half = found["50% of the hybrid's"]  # a loss of 2.25: full after 7.5 steps, the others after 15
    assert half[1:3] == ["2.250", "8"]
    assert half[3:6] == ["15", "140% (140%–140%)", "100% (100%–100%)"]
    assert half[6:9] == ["15", "140% (140%–140%)", "50% (50%–50%)"]
    end = found["100% of the hybrid's"]
    assert end[6:9] == ["40 (in 1 of 2 seeds)", "", ""]
    assert found["100% of full's"][3:] == ["not reached", "", "", "not reached", "", ""]
    assert tables.table([head, *trials, *seeds]) == tables.table([]) == ""
