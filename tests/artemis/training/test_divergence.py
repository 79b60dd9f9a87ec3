"""A run whose loss or parameters are no numbers any more."""

import pytest
import torch

from artemis import AdapterError
from artemis.training.divergence import StopWhereDiverged, check_parameters
from tests.artemis.models import llama
from tests.artemis.training.kit import hybrid, trainer_for


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_parameters_that_are_not_finite_are_named(wrong):
    model = hybrid()
    check_parameters(model)
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        parameter.view(-1)[-1] = wrong
    with pytest.raises(AdapterError, match=f"^{name}: not finite: training has diverged"):
        check_parameters(model)
    parameter.requires_grad_(False)
    check_parameters(model)


def test_a_run_ends_at_the_first_report(tmp_path):
    trainer = trainer_for(hybrid(), tmp_path, max_steps=20, logging_steps=2, learning_rate=1e30)
    trainer.add_callback(StopWhereDiverged)
    with pytest.raises(AdapterError, match="^the loss at step 4 is nan: training has diverged"):
        trainer.train()
    assert trainer.state.global_step == 4


def test_a_run_that_goes_well_is_left_alone(tmp_path):
    trainer = trainer_for(llama(), tmp_path, max_steps=2)
    trainer.add_callback(StopWhereDiverged)
    assert trainer.train().global_step == 2
