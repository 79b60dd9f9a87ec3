"""The study of importance: its statistics, and that a case is what it says."""

import numpy
import pytest
import torch

from bench import importance, importance_tables


def test_ranks_share_what_is_equal():
    assert importance.ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [2.5, 0.0, 2.5, 1.0]


def test_rank_correlation():
    values = [0.1, 0.5, 0.2, 0.9, 0.4]
    assert importance.spearman(values, [v**3 for v in values]) == pytest.approx(1)
    assert importance.spearman(values, [-v for v in values]) == pytest.approx(-1)
    assert importance.spearman(values, [1.0] * 5) == 0
    # 1 − 6 Σd² / (n (n² − 1)), d the differences of ranks
    assert importance.spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 24 / 120)


def record(seed: int, oracle: list[float], scores: list[float]) -> dict:
    paths = [f"layers.{i}.{kind}" for i in range(2) for kind in ("q", "k")]
    return {
        "kind": "importance", "run": "r", "architecture": "llama", "seed": seed,
        "planted": paths[:1],
        "oracles": {part: dict(zip(paths, oracle, strict=True)) for part in importance.RATES},
        "scores": {m: dict(zip(paths, scores, strict=True)) for m in importance.METHODS},
    }  # fmt: skip


def test_a_constant_score_follows_no_differences_and_a_true_one_all():
    first, second = [4.0, 1.0, 3.0, 2.0], [1.0, 4.0, 2.0, 3.0]
    true = [record(0, first, first), record(1, second, second)]
    fixed = [record(0, first, first), record(1, second, first)]
    assert importance.agreement(true, "adapter", "snr")["differences"] == {
        "llama": pytest.approx(1)
    }
    assert importance.agreement(fixed, "adapter", "snr")["differences"] == {"llama": 0.0}
    # The control is made of the other case alone, which here says the opposite.
    assert max(importance.agreement(true, "adapter", importance.BY_KIND)["cases"]) < 0


def test_the_tables_show_the_last_run_of_each_architecture():
    old = record(0, [1.0, 2, 3, 4], [4.0, 3, 2, 1]) | {"run": "old"}
    new = record(0, [1.0, 2, 3, 4], [1.0, 2, 3, 4])
    head = {"kind": "importance-run", "run": "r", "versions": {"torch": "2"}, "time": "2026-01-01"}
    text = importance_tables.summary([old, head, new])
    assert "| adapter | `snr` | 1.00 |" in text and "1 cases" in text
    assert importance_tables.all_cases([old, head, new]).count("| llama 0 |") == 1
    assert importance_tables.summary([]) == ""


def test_a_case_and_its_oracle(monkeypatch):
    monkeypatch.setattr(importance, "HELD_OUT", 64)
    case = importance.make_case(importance.ARCHITECTURES["llama"], 0)
    state = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    falls = importance.oracle(case, "weight")
    assert set(falls) == set(case.model.hybrid_adapter.sites) >= set(case.planted)
    assert numpy.mean(list(falls.values())) > 0  # training helps
    for name, tensor in case.model.state_dict().items():
        assert torch.equal(tensor, state[name])
