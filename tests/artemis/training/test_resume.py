"""A run that is cut short and goes on from a checkpoint ends where an uninterrupted one does."""

import json
from pathlib import Path

import pytest
import torch
from transformers.trainer_utils import TrainOutput

from artemis import AdapterError
from artemis.training import Trainer
from artemis.training.throughput import of_this_call
from tests.artemis.models import llama
from tests.artemis.training.kit import (
    StopAfter,
    assert_equal_states,
    hybrid,
    trained_state,
    trainer_for,
)

# Dropout, sharing and the penalty: whatever a checkpoint forgets shows in the bits.
ADAPTER = dict(adapter_dropout=0.3, lora_dropout=0.3, orthogonality_weight=0.1)


def uninterrupted(directory: Path, **changes) -> dict[str, torch.Tensor]:
    model = hybrid(**ADAPTER)
    trainer_for(model, directory, **changes).train()
    return trained_state(model)


def interrupt(directory: Path, after: int, **changes) -> None:
    trainer = trainer_for(hybrid(**ADAPTER), directory, **changes)
    trainer.add_callback(StopAfter(after))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(dict(save_steps=3), id="within-an-epoch"),
        pytest.param(dict(save_steps=4), id="between-epochs"),
        pytest.param(dict(save_steps=3, accumulation=2), id="accumulation"),
        pytest.param(dict(save_steps=3, checkpointing=True), id="checkpointing"),
    ],
)
def test_resumed_run_equals_uninterrupted_one(tmp_path, changes):
    expected = uninterrupted(tmp_path / "whole", **changes)
    interrupt(tmp_path / "cut", after=5, **changes)
    model = hybrid(**ADAPTER)
    trainer_for(model, tmp_path / "cut", **changes).train(True)
    assert_equal_states(trained_state(model), expected)


def test_a_path_resumes_from_that_checkpoint(tmp_path):
    expected = uninterrupted(tmp_path, save_steps=2, save_total_limit=None)
    model = hybrid(**ADAPTER)
    trainer = trainer_for(model, tmp_path, save_steps=2)
    output = trainer.train(str(tmp_path / "checkpoint-2"))
    assert output.global_step == 6
    assert_equal_states(trained_state(model), expected)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(dict(max_steps=6), id="within-an-epoch"),
        pytest.param(dict(max_steps=8), id="between-epochs"),
        pytest.param(dict(max_steps=None, epochs=1.5), id="half-an-epoch"),
        pytest.param(dict(max_steps=None, epochs=0.4, accumulation=2), id="accumulation"),
    ],
)
def test_a_run_whose_steps_are_done_trains_nothing_more(tmp_path, changes):
    changes = dict(schedule="constant", save_steps=2, save_total_limit=None) | changes
    whole = hybrid(**ADAPTER)
    trainer = trainer_for(whole, tmp_path, **changes)
    steps = trainer.train().global_step
    assert steps == trainer.state.max_steps
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    model = hybrid(**ADAPTER)
    again = trainer_for(model, tmp_path, **changes)
    output = again.train(True)
    assert_equal_states(trained_state(model), trained_state(whole))
    assert (output.global_step, output.training_loss) == (steps, 0)
    assert output.metrics["train_steps_per_second"] == 0
    # The log ends with the run's summary.
    assert [entry["step"] for entry in again.state.log_history[:-1]] == list(range(1, steps + 1))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_fewer_steps_than_are_done_train_nothing(tmp_path):
    expected = uninterrupted(tmp_path, save_steps=2, max_steps=7)
    model = hybrid(**ADAPTER)
    output = trainer_for(model, tmp_path, save_steps=2, max_steps=5).train(True)
    assert output.global_step == 7
    assert_equal_states(trained_state(model), expected)


def test_loss_and_rates_are_of_the_resumed_steps(tmp_path):
    uninterrupted(tmp_path, save_steps=4, save_total_limit=None)
    trainer = trainer_for(hybrid(**ADAPTER), tmp_path, save_steps=4)
    output = trainer.train(str(tmp_path / "checkpoint-4"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert output.training_loss == pytest.approx(sum(losses[4:]) / 2, rel=1e-3)
    assert output.metrics["train_loss"] == output.training_loss
    rates = [output.metrics[f"train_{name}_per_second"] for name in ("steps", "samples")]
    assert rates[0] * output.metrics["train_runtime"] == pytest.approx(2, rel=0.02)
    assert rates[1] == pytest.approx(2 * rates[0], rel=0.02)


def test_what_older_transformers_divide_by_all_steps_is_of_the_resumed_ones():
    rates = {"train_steps_per_second": 5.0, "train_samples_per_second": 40.0}
    metrics = rates | {"train_runtime": 2.0, "train_loss": 0.3, "epoch": 1.0}
    found = of_this_call(TrainOutput(10, 0.3, metrics), begun=8, max_steps=10)
    assert found.training_loss == pytest.approx(1.5)  # 3.0 in all, over two steps
    assert found.metrics == pytest.approx(
        {
            "train_steps_per_second": 1.0, "train_samples_per_second": 8.0, "train_runtime": 2.0,
            "train_loss": 1.5, "epoch": 1.0,
        }
    )  # fmt: skip


def test_resume_may_stand_beside_a_model(tmp_path):
    expected = uninterrupted(tmp_path, save_steps=4)
    model = hybrid(**ADAPTER)
    late = trainer_for(hybrid(**ADAPTER), tmp_path, save_steps=4)
    late.train(model, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_equal_states(trained_state(model), expected)


@pytest.mark.parametrize("damage", ["missing", "cut", "no adapter"])
def test_a_checkpoint_cut_short_is_passed_over(tmp_path, damage):
    expected = uninterrupted(tmp_path, save_steps=2, save_total_limit=None)
    state = tmp_path / "checkpoint-6" / "trainer_state.json"
    if damage == "missing":
        state.unlink()
    elif damage == "no adapter":
        (state.parent / "hybrid_adapter.safetensors").unlink()
    else:
        state.write_text(state.read_text()[:-20])
    model = hybrid(**ADAPTER)
    trainer = trainer_for(model, tmp_path, save_steps=2, save_total_limit=None)
    steps = []
    trainer.log = lambda logs, *args: steps.append(trainer.state.global_step)
    trainer.train(True)
    assert min(steps) == 5
    assert_equal_states(trained_state(model), expected)


def test_a_path_without_an_adapter_is_no_checkpoint(tmp_path):
    uninterrupted(tmp_path, save_steps=2)
    (tmp_path / "checkpoint-6" / "hybrid_adapter.safetensors").unlink()
    with pytest.raises(AdapterError, match="complete checkpoint: hybrid_adapter.safetensors is mi"):
        trainer_for(hybrid(**ADAPTER), tmp_path).train(str(tmp_path / "checkpoint-6"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("optimizer.pt", "the optimizer and the schedule of the learning rate begin anew"),
        ("scheduler.pt", "the optimizer and the schedule of the learning rate begin anew"),
        ("rng_state.pth", "dropout draws other masks"),
    ],
)
def test_what_a_checkpoint_lacks_is_said(tmp_path, name, words):
    expected = uninterrupted(tmp_path, save_steps=4)
    checkpoint = tmp_path / "checkpoint-4"
    (checkpoint / name).unlink()
    model = hybrid(**ADAPTER)
    trainer = trainer_for(model, tmp_path)
    with pytest.warns(UserWarning, match=f"^{name}: missing in {checkpoint}.* {words}$"):
        trainer.train(str(checkpoint))
    # What is said is so: another end, and the rate of the first steps.
    got = trained_state(model)
    assert not all(torch.equal(got[key], expected[key]) for key in expected)
    learning_rates = [
        entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry
    ]
    assert (learning_rates[4:] == learning_rates[:2]) == (name != "rng_state.pth")


def test_interrupted_save_over_an_old_checkpoint_does_not_count(tmp_path, monkeypatch):
    uninterrupted(tmp_path, save_steps=2, save_total_limit=None)

    def killed(self, output_dir):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", killed)
    trainer = trainer_for(hybrid(**ADAPTER), tmp_path, save_steps=2, save_total_limit=None)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    # New parameters beside an old optimizer: a mixture that nothing may resume from.
    with pytest.raises(AdapterError, match="not a complete checkpoint"):
        trainer.train(str(tmp_path / "checkpoint-2"))


def test_nothing_to_resume_from(tmp_path):
    trainer = trainer_for(hybrid(), tmp_path)
    with pytest.raises(AdapterError, match="no complete checkpoint under"):
        trainer.train(True)
    with pytest.raises(AdapterError, match="absent"):
        trainer.train(str(tmp_path / "absent"))


def test_resuming_another_adapter_is_refused(tmp_path):
    trainer_for(hybrid(), tmp_path, save_steps=2).train()
    other = hybrid(lora_rank=3)
    before = trained_state(other)
    with pytest.raises(AdapterError, match="does not fit the model"):
        trainer_for(other, tmp_path, save_steps=2).train(True)
    assert_equal_states(trained_state(other), before)


def test_a_whole_model_resumes_as_in_transformers(tmp_path):
    torch.manual_seed(1)
    model = llama()
    trainer_for(model, tmp_path, save_steps=4).train()
    assert (tmp_path / "checkpoint-4" / "model.safetensors").is_file()
    expected = trained_state(model)
    torch.manual_seed(1)
    again = llama()
    trainer_for(again, tmp_path, save_steps=4).train(str(tmp_path / "checkpoint-4"))
    assert_equal_states(trained_state(again), expected)


def test_the_state_is_written_last(tmp_path):
    """`complete_checkpoint` takes a readable state for a complete checkpoint."""
    trainer_for(hybrid(), tmp_path, save_steps=6).train()
    checkpoint = tmp_path / "checkpoint-6"
    written = {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    assert max(written, key=written.get) == "trainer_state.json"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 6
