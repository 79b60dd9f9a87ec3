"""The study of adapters: what it runs, what it leaves out, and its tables from records."""

import json

import pytest
import torch

from bench import adapters_study, adapters_tables
from bench.adapters_study import ARMS, TRIAL_SEED, TRIALS, Task, main


@pytest.fixture
def small(monkeypatch):
    """Two steps on random bytes, in place of texts and a trained base."""
    monkeypatch.setattr(adapters_study, "STEPS", 2)
    blocks = torch.randint(0, 256, (64, 8))

    def make_task() -> Task:
        torch.manual_seed(0)
        return Task(adapters_study._model().state_dict(), blocks, blocks[:8], blocks[8:16])

    monkeypatch.setattr(adapters_study, "make_task", make_task)


def _records(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_goes_on_where_the_file_ends(small, tmp_path):
    out = tmp_path / "study.jsonl"
    arms = ["--arms", "default", "svd", "ranks by importance within kinds"]
    assert main(["--out", str(out), "--seeds", "1", *arms]) == 0
    first = _records(out)
    assert len(first) == 1 + 3 * (len(TRIALS) + 1)
    assert main(["--out", str(out), "--seeds", "1", *arms]) == 0
    assert _records(out) == first
    assert main(["--out", str(out), "--seeds", "2", *arms]) == 0
    assert len(_records(out)) == len(first) + 1 + 3
    for record in _records(out):
        if "arm" in record and record["seed"] < TRIAL_SEED:
            own = [r for r in first if r.get("arm") == record["arm"] and r["seed"] >= TRIAL_SEED]
            assert record["rate"] == min(own, key=lambda r: r["loss"])["rate"]
    assert "| svd | 2 |" in adapters_tables.table(_records(out), "init")


def test_a_table_pairs_by_seed():
    head = {"run": "r", "kind": "adapters-run", "versions": {"torch": "2"}, "threads": 1,
            "time": "2026-01-01T00"}  # fmt: skip
    common = {"kind": "adapters", "run": "r", "rate": TRIALS[1], "before": 3.0, "parameters": 7,
              "seconds_a_step": 0.01, "condition_a": 2.0, "condition_b": None}  # fmt: skip
    losses = {"default": (2.0, 1.0, 3.0), "svd": (1.9, 0.9, 2.9)}
    rows = [
        {**common, "arm": arm, "seed": seed, "loss": loss}
        for arm, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    trials = [
        {**common, "arm": arm, "seed": TRIAL_SEED, "rate": rate, "loss": float(rate != TRIALS[1])}
        for arm in losses
        for rate in TRIALS
    ]
    stray = {**common, "arm": "svd", "seed": 0, "rate": TRIALS[0], "loss": 99.0}
    table = adapters_tables.table([head, *trials, *rows, stray], "init")
    assert "| svd | 3 | 1.900 | -0.100 (-0.100 to -0.100) |" in table
    assert "gaussian" not in table and adapters_tables.table([], "init") == ""


def test_every_arm_belongs_to_a_table():
    parts = {"default", "orthogonality", "init", "sharing", "allocation"}
    assert {arm.part for arm in ARMS.values()} == parts
