"""`compile: true`: the same training under `torch.compile`, and the same files."""

import pytest
import torch
from safetensors import safe_open

from artemis.training import Trainer
from artemis.training.compiling import can_compile
from tests.artemis.training.kit import (
    StopAfter,
    assert_equal_states,
    blocks,
    hybrid,
    settings,
    trained_state,
)

pytestmark = pytest.mark.skipif(
    not can_compile(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    reason="torch.compile finds no compiler",
)
DROPOUT = dict(adapter_dropout=0.3, lora_dropout=0.3, orthogonality_weight=0.1)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def trainer_for(model, directory, backend="aot_eager", **changes) -> Trainer:
    """`backend`: aot_eager makes the graphs and no code to wait for."""
    arguments = settings(directory, compile=True, **changes).arguments()
    arguments.torch_compile_backend = backend
    data = dict(train_dataset=blocks(), eval_dataset=blocks(2))
    return Trainer(model, arguments, **data)


def test_it_learns_what_it_learns_without(tmp_path):
    plain, compiled = hybrid(adapter_dropout=0.0), hybrid(adapter_dropout=0.0)
    Trainer(plain, settings(tmp_path).arguments(), train_dataset=blocks()).train()
    trainer_for(compiled, tmp_path, backend="inductor").train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    got, expected = trained_state(compiled), trained_state(plain)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"checkpointing": True}], ids=["", "checkpointing"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, changes):
    whole, cut, resumed = (hybrid(**DROPOUT) for _ in range(3))
    trainer = trainer_for(whole, tmp_path / "whole", **changes)
    trainer.train()
    interrupted = trainer_for(cut, tmp_path / "cut", save_steps=3, **changes)
    interrupted.add_callback(StopAfter(5))
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    trainer_for(resumed, tmp_path / "cut", save_steps=3, **changes).train(True)
    assert_equal_states(trained_state(resumed), trained_state(whole))
    trainer.save_model()
    with safe_open(tmp_path / "whole" / "hybrid_adapter.safetensors", framework="pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert_equal_states(saved, trained_state(whole))


def test_it_evaluates_as_without(tmp_path):
    """Also between steps, where the constants of inference are made of what has changed since."""
    model = hybrid(**DROPOUT)
    trainer = trainer_for(model, tmp_path, eval_steps=2, max_steps=4)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    plain = Trainer(model, settings(tmp_path).arguments(), eval_dataset=blocks(2))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
