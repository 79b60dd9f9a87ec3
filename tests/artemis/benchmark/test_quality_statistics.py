"""Quality: the figures against calculations by hand, and what pairing does to an interval."""

import numpy
import pytest

from artemis.benchmark.quality.results import Dataset, datasets
from artemis.benchmark.quality.statistics import (
    bootstrap,
    difference,
    gap_closed,
    retention,
    student,
)


def test_student_by_hand():
    # mean 3, deviation √2.5, five seeds: 2.776 · √(2.5 / 5)
    found = student([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.value == 3
    assert found.high - 3 == 3 - found.low == pytest.approx(2.776 * 0.5**0.5)


def test_one_seed_has_no_interval():
    assert student([0.5]).to_dict() == {"value": 0.5, "low": None, "high": None}


def test_ratios_by_hand():
    assert retention(0.9, 0.96) == pytest.approx(0.9375)
    assert gap_closed(0.9, 0.96, 0.8) == pytest.approx(0.625)


def matrices() -> tuple[numpy.ndarray, numpy.ndarray]:
    """An arm that is right on 70 % of the items, and one that is right on 20 more of 1,000."""
    random = numpy.random.default_rng(1)
    one = random.random((5, 1000)) < 0.7
    other = one.copy()
    for row in other:
        row[numpy.flatnonzero(~row)[:20]] = True
    return other, one


def test_the_bootstrap_is_paired():
    better, worse = matrices()
    found = bootstrap([better, worse], difference)
    assert found.value == pytest.approx(0.02)
    # In pairs only the 20 items vary: a deviation of at most √0.02 / √1000 a seed.
    assert 0.02 - 3 * (0.02 / 1000) ** 0.5 < found.low < 0.02 < found.high
    alone = bootstrap([worse], lambda accuracy: accuracy)
    unpaired = 2**0.5 * (alone.high - alone.low)
    assert found.high - found.low < unpaired / 2


def test_the_bootstrap_agrees_with_the_normal_interval_of_a_share():
    right = numpy.random.default_rng(2).random((1, 4000)) < 0.8
    found = bootstrap([right], lambda accuracy: accuracy)
    mean = right.mean()
    half = 1.96 * (mean * (1 - mean) / 4000) ** 0.5
    assert found.low == pytest.approx(mean - half, abs=0.1 * half)
    assert found.high == pytest.approx(mean + half, abs=0.1 * half)


def test_seeds_are_drawn_too():
    """Items say nothing here: all of the scatter is between seeds."""
    right = numpy.array([[True] * 50, [False] * 50])
    found = bootstrap([right], lambda accuracy: accuracy)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0, 1))


def test_arms_with_other_items_are_refused():
    with pytest.raises(ValueError, match="different shapes"):
        bootstrap([numpy.ones((2, 3), bool), numpy.ones((2, 4), bool)], difference)


def cell(arm: str, seed: int, wrong: list[int], **changes) -> dict:
    return {
        "dataset": "toy", "arm": arm, "seed": seed, "items": 10, "wrong": wrong,
        "accuracy": 1 - len(wrong) / 10, "trained_parameters": 5, "seconds": 1.0, "choice": 1e-4,
    } | changes  # fmt: skip


def toy() -> Dataset:
    wrong = {"frozen": [0, 1, 2, 3, 4], "full": [0], "hybrid": [0, 1]}
    cells = [cell(arm, seed, items) for arm, items in wrong.items() for seed in range(3)]
    (found,) = datasets([*cells, cell("full", 3, [])])  # a fourth seed that one arm has
    return found


def test_rows_by_hand():
    rows = {row["arm"]: row for row in toy().rows()}
    assert {arm: row["seeds"] for arm, row in rows.items()} == {"frozen": 3, "full": 4, "hybrid": 3}
    hybrid = rows["hybrid"]
    assert hybrid["accuracy"]["value"] == pytest.approx(0.8)
    assert hybrid["retention"]["value"] == pytest.approx(0.8 / 0.9)
    assert hybrid["gap"]["value"] == pytest.approx(0.3 / 0.4)
    assert rows["full"]["retention"] is None and rows["frozen"]["gap"] is None
    assert rows["full"]["accuracy"]["value"] == pytest.approx((3 * 0.9 + 1.0) / 4)


def test_comparisons_and_targets_by_hand():
    (found,) = toy().comparisons()
    assert found["difference"]["value"] == pytest.approx(-0.1) and found["seeds"] == 3
    assert found["what"] == "hybrid, shared (default), against full fine-tuning"
    assert found["verdict"] == "not told apart"  # one item of ten, and not drawn in a third of all
    verdicts = {row["what"]: row["verdict"] for row in toy().targets()}
    assert set(verdicts) == {"retention", "gap closed"}
    assert verdicts["retention"].startswith("below")


def test_a_target_beyond_the_interval_is_missed_and_within_it_is_met():
    wrong = {"frozen": range(50), "full": [0], "hybrid": range(30)}
    cells = [
        cell(arm, s, list(w), items=100, accuracy=0) for arm, w in wrong.items() for s in range(3)
    ]
    assert {row["verdict"] for row in datasets(cells)[0].targets()} == {"missed"}
    for each in cells:
        if each["arm"] == "hybrid":
            each["wrong"] = []
    assert {row["verdict"] for row in datasets(cells)[0].targets()} == {"met"}
    two_seeds = [each for each in cells if each["seed"] < 2]
    (found,) = datasets(two_seeds)
    rows = [*found.targets(), *found.comparisons()]
    assert {row["verdict"] for row in rows} == {"no verdict below 3 seeds"}
