"""Ranks that change while the trainer runs."""

from types import SimpleNamespace

import pytest
import torch

from artemis import AdapterError
from artemis.training import RankAllocationCallback
from tests.artemis.training.kit import (
    StopAfter,
    assert_equal_states,
    blocks,
    hybrid,
    trained_state,
    trainer_for,
)

BOUNDS = dict(min_rank=2, max_rank=8)


def reallocating(model, directory, until=None, **changes):
    trainer = trainer_for(model, directory, **changes)
    callback = RankAllocationCallback(
        blocks(), 2, until, analysis=dict(batches=2, batch_size=4), allocation=BOUNDS
    )
    trainer.add_callback(callback)
    return trainer, callback


def sizes(model) -> dict[str, int]:
    return {path: site.spec.size for path, site in model.hybrid_adapter.sites.items()}


@pytest.mark.parametrize("shared", [True, False])
def test_ranks_change_on_schedule_and_training_goes_on(tmp_path, shared):
    model = hybrid(shared_parameters=shared)
    trainer, callback = reallocating(model, tmp_path)
    assert trainer.train().global_step == 6
    assert [step for step, _ in callback.reports] == [2, 4]
    assert callback.reports[-1][1].sizes == sizes(model)
    assert len(set(sizes(model).values())) > 2
    for parameter, state in trainer.optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape
    assert all(torch.isfinite(value).all() for value in trained_state(model).values())


def test_until_is_the_last_step_that_may_change_ranks(tmp_path):
    trainer, callback = reallocating(hybrid(), tmp_path, until=3)
    trainer.train()
    assert [step for step, _ in callback.reports] == [2]


def test_a_resumed_run_takes_up_the_sizes_and_ends_alike(tmp_path):
    changes = dict(save_steps=3)
    whole = hybrid()
    reallocating(whole, tmp_path / "whole", **changes)[0].train()
    cut, _ = reallocating(hybrid(), tmp_path / "cut", **changes)
    cut.add_callback(StopAfter(4))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    model = hybrid()
    before = sizes(model)
    reallocating(model, tmp_path / "cut", **changes)[0].train(True)
    assert sizes(model) == sizes(whole) != before
    assert_equal_states(trained_state(model), trained_state(whole))


@pytest.mark.parametrize("options", [dict(every=0), dict(every=True), dict(every=2, until=0)])
def test_refusals(options):
    with pytest.raises(AdapterError, match="allowed: an integer from 1"):
        RankAllocationCallback(blocks(), **options)


def test_several_processes_are_refused():
    callback = RankAllocationCallback(blocks(), 2)
    callback.on_train_begin(SimpleNamespace(world_size=1), None, None)
    with pytest.raises(AdapterError, match="got 2 processes, allowed: one, since DDP"):
        callback.on_train_begin(SimpleNamespace(world_size=2), None, None)
