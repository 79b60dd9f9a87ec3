"""A run that goes on with other settings says which of them its checkpoint outweighs."""

import re
import warnings

import pytest
from torch.utils.data import IterableDataset
from transformers import TrainerState

from artemis.training import Trainer
from artemis.training.resuming import place_in_stream
from tests.artemis.training.kit import (
    StopAfter,
    assert_equal_states,
    blocks,
    hybrid,
    settings,
    trained_state,
)

# The first run is cut after three of six steps: three quarters of an epoch, in batches of two.
SETTINGS = dict(save_steps=3, weight_decay=0.1)


class Stream(IterableDataset):
    """The blocks again and again, with no length."""

    def __iter__(self):
        data = blocks()
        while True:
            yield from (data[index] for index in range(len(data)))


class OnePass(IterableDataset):
    """The blocks, with no length."""

    def __iter__(self):
        data = blocks()
        return (data[index] for index in range(len(data)))


class Recorder(Trainer):
    """Remembers the examples that it was trained on."""

    def training_step(self, model, inputs, *args):
        self.examples = getattr(self, "examples", []) + inputs["input_ids"].tolist()
        return super().training_step(model, inputs, *args)


def run(directory, until: int, checkpoint=None, data=None, **changes) -> Recorder:
    """Train to step `until`, and end as Ctrl-C would."""
    skip = changes.pop("ignore_data_skip", False)
    arguments = settings(directory, **SETTINGS | changes).arguments()
    arguments.ignore_data_skip = skip
    data = data or blocks()
    trainer = Recorder(hybrid(), arguments, train_dataset=data, eval_dataset=data)
    trainer.add_callback(StopAfter(until))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(checkpoint)
    return trainer


def resume(directory, until: int = 5, **changes) -> tuple[list[str], Recorder]:
    """What resuming warns of, and the trainer at step `until`."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer = run(directory, until, checkpoint=True, **changes)
    return [str(warning.message) for warning in seen], trainer


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="settings"),
        pytest.param({"accumulation": 3}, id="ragged"),
        pytest.param({"eval_steps": 2}, id="evaluation"),
        pytest.param({"learning_rate": 0.1 + 0.2, "weight_decay": 0.0}, id="rates"),
    ],
)
def test_nothing_is_said_of_what_is_the_same(tmp_path, changes):
    """Nor of what the arguments decide: the schedule, its length, the norm."""
    run(tmp_path, 3, **changes)
    others = dict(max_steps=9, schedule="linear", warmup=0.1, max_grad_norm=0.5)
    assert resume(tmp_path, **changes | others)[0] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 2e-2}, r"^learning_rate: .* has 0\.01, which is kept; 0\.02 is not"),
        ({"weight_decay": 0.3}, r"^weight_decay: .* has 0\.1, which is kept; 0\.3 is not"),
        ({"logging_steps": 2}, r"^logging_steps: .* has 1, which is kept; 2 is not"),
        ({"eval_steps": 2}, r"^eval_steps: .* has 4, which is kept; 2 is not"),
        ({"save_steps": 2}, r"^save_steps: .* has 3, which is kept; 2 is not"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_what_the_checkpoint_outweighs_is_named_and_kept(tmp_path, changes, words):
    run(tmp_path, 3, eval_steps=4)
    sentences, trainer = resume(tmp_path, **{"eval_steps": 4} | changes)
    assert len(sentences) == 1 and re.search(words, sentences[0]), sentences
    decayed, plain = trainer.optimizer.param_groups
    assert (decayed["initial_lr"], decayed["weight_decay"], plain["weight_decay"]) == (1e-2, 0.1, 0)
    state = trainer.state
    assert (state.logging_steps, state.eval_steps, state.save_steps) == (1, 4, 3)


def test_one_sentence_for_each_setting(tmp_path):
    run(tmp_path, 3)
    sentences, _ = resume(tmp_path, learning_rate=2e-2, logging_steps=2, save_steps=2, batch_size=1)
    names = {sentence.split(":")[0] for sentence in sentences}
    assert names == {
        "learning_rate", "logging_steps", "save_steps", "batch size, accumulation or data"
    }  # fmt: skip
    assert len(sentences) == 4


def test_steps_that_have_no_effect_are_not_spoken_of(tmp_path):
    run(tmp_path, 3, eval_steps=4)
    assert resume(tmp_path, eval_steps=None, save_steps=None)[0] == []


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        (1, 2, r"0\.375 epochs in 3 steps \(batches of 1\), which are 0\.75 .* are left out$"),
        (2, 1, r"0\.75 epochs in 3 steps \(batches of 2\), which are 0\.375 .* are seen again$"),
    ],
)
def test_another_batch_size_moves_the_place_in_the_data(tmp_path, first, then, words):
    order = run(tmp_path / "whole", 8, batch_size=1, max_steps=9, save_steps=None).examples
    assert run(tmp_path, 3, batch_size=first).examples == order[: 3 * first]
    sentences, trainer = resume(tmp_path, batch_size=then)
    assert len(sentences) == 1 and re.search(words, sentences[0]), sentences
    # What is said is what happens.
    assert trainer.examples[:2] == order[3 * then : 3 * then + 2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accumulation": 2}, r"which are 1\.5 epochs .* are left out$"),
        ({"data": blocks(12)}, r"which are 0\.5 epochs .* are seen again$"),
    ],
    ids=["accumulation", "data"],
)
def test_what_else_moves_the_place_in_the_data(tmp_path, changes, words):
    run(tmp_path, 3)
    sentences, _ = resume(tmp_path, **changes)
    assert len(sentences) == 1 and re.search(words, sentences[0]), sentences


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        pytest.param(None, {"batch_size": 1, "accumulation": 2}, id="as many a step"),
        pytest.param(None, {"batch_size": 1, "ignore_data_skip": True}, id="nothing skipped"),
        pytest.param(Stream(), {"max_steps": 9}, id="no length"),
    ],
)
def test_the_place_stays(tmp_path, data, changes):
    run(tmp_path, 3, data=data)
    assert resume(tmp_path, data=data, **changes)[0] == []


@pytest.mark.parametrize(("cut", "accumulation"), [(2, 1), (4, 1), (5, 1), (9, 1), (3, 2)], ids=str)
def test_a_stream_goes_on_where_it_was(tmp_path, cut, accumulation):
    """Four batches make a pass over data that has no length."""
    changes = dict(data=OnePass(), max_steps=12, save_steps=1, accumulation=accumulation)
    whole = run(tmp_path / "whole", 10, **changes)
    run(tmp_path, cut, **changes)
    sentences, trainer = resume(tmp_path, 10, **changes)
    assert sentences == []
    assert trainer.examples == whole.examples[2 * accumulation * cut :]
    assert_equal_states(trained_state(trainer.model), trained_state(whole.model))


@pytest.mark.parametrize(
    ("epoch", "place"),
    [(0, (0, 0)), (4 / 12, (0, 4)), (1.0, (0, 12)), (1 + 1 / 12, (1, 1)), (7 + 11 / 12, (7, 11))],
)
def test_the_place_in_a_stream(epoch, place):
    """A run of 12 steps whose only pass is as long ends in that pass, not after it."""
    assert place_in_stream(TrainerState(epoch=epoch), 12) == place
