"""The study of LoRA on the output head: what trains, that it resumes, and what its table says."""

import pytest
import torch

from artemis.benchmark.records import read
from artemis.cli.demo.recipe import QUICK
from bench import head_adaptation as study
from bench import head_tables


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(study.TOKENS, "byte pairs", 40)
        patch.setattr(study, "SEEDS", range(1))
        study.run(folder, folder / "out.jsonl", QUICK)
        yield folder


def test_every_arm_learns_over_either_kind_of_tokens(measured):
    records = [r for r in read(measured / "out.jsonl") if r["kind"] == study.KIND]
    found = {(r["tokens"], r["arm"]): r for r in records}
    assert set(found) == {(tokens, arm) for tokens in study.TOKENS for arm in (None, *study.ARMS)}
    for (tokens, arm), record in found.items():
        assert arm is None or record["loss"] < found[tokens, None]["loss"]
    for tokens, words in (("bytes", 257), ("byte pairs", 297)):
        more = [found[tokens, arm]["parameters"] for arm in (study.WITH_HEAD, study.HYBRID)]
        assert more[0] - more[1] == 8 * (QUICK.hidden_size + words) + 1  # A, B and a gain


def test_what_is_known_is_not_measured_again(measured):
    before = (measured / "out.jsonl").read_text()
    study.run(measured, measured / "out.jsonl", QUICK)
    assert (measured / "out.jsonl").read_text() == before


def test_shares_are_of_full_fine_tunings_improvement_in_the_same_seed():
    def record(tokens, arm, seed, loss):
        return {
            "kind": study.KIND, "run": "mine", "tokens": tokens, "arm": arm, "seed": seed,
            "loss": loss, "parameters": 1000,
        }  # fmt: skip

    head = {
        "kind": "run", "run": "mine", "recipe": QUICK.__dict__, "versions": {"torch": "2"},
        "time": "2026-01-01T00",
    }  # fmt: skip
    records = [head, {"kind": "run", "run": "another study's"}]
    for tokens in study.TOKENS:
        records.append(record(tokens, None, None, 4.0))
        for seed, full in enumerate((2.0, 3.0)):
            records.append(record(tokens, study.FULL, seed, full))
            records.append(record(tokens, study.HYBRID, seed, 3.5))
            records.append(record(tokens, study.WITH_HEAD, seed, 3.0))
    rows = head_tables.table(records).splitlines()
    assert "| bytes | hybrid | 1,000 | 3.5000 | 38% | 25% to 50% |" in rows
    assert f"| byte pairs | {study.WITH_HEAD} | 1,000 | 3.0000 | 75% | 50% to 100% |" in rows
    assert head_tables.table([]) == head_tables.table(records[:3]) == ""


def test_the_base_is_that_of_the_merges(measured):
    model, tokenizer = study.load_base(str(measured / "byte-pairs" / "base"), torch.float32)
    assert model.config.vocab_size == len(tokenizer) == 297
