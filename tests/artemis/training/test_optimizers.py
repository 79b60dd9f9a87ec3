"""What the optimizer holds when a trainer is called again: what the model trains by then."""

import pytest
import torch

from artemis import AdapterError, set_dynamic_rank_allocation
from artemis.training import Trainer
from artemis.training.compiling import can_compile
from tests.artemis.models import adapted, bert, llama
from tests.artemis.training.kit import assert_equal_states, blocks, settings, trained_state

COMPILER = can_compile(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def base():
    torch.manual_seed(1)
    return llama(num_hidden_layers=1)


def added(model, **changes):
    """The adapter alike at each call, whatever was drawn before."""
    torch.manual_seed(2)
    targets = dict(target_modules=["q_proj", "down_proj"], apply_lora_to=["q_proj"])
    return adapted(model, **targets | dict(adapter_dropout=0.0) | changes)


def trainer_with(directory, model=None, optimizers=(None, None), compiled=False) -> Trainer:
    arguments = settings(directory, max_steps=2, warmup=0.0, compile=compiled).arguments()
    if compiled:
        arguments.torch_compile_backend = "eager"
    return Trainer(model, arguments, train_dataset=blocks(), optimizers=optimizers)


def train(trainer, *model):
    """The order of the examples too alike at each call."""
    torch.manual_seed(3)
    trainer.train(*model)
    return trained_state(trainer.model)


def assert_all_moved(state, start):
    assert not [name for name in start if torch.equal(state[name], start[name])]


def test_each_of_several_adapters_learns_what_it_learns_alone(tmp_path):
    model = base()
    trainer = trainer_with(tmp_path, model)
    for rank in (2, 4, 8):
        start = trained_state(added(model, lora_rank=rank))
        got = train(trainer, model)
        assert_all_moved(got, start)
        alone = added(base(), lora_rank=rank)
        assert_equal_states(got, train(trainer_with(tmp_path, alone)))
        model.remove_adapter()


@pytest.mark.skipif(not COMPILER, reason="torch.compile finds no compiler")
def test_under_the_compiler_too(tmp_path):
    torch.compiler.reset()
    model = base()
    trainer = trainer_with(tmp_path, model, compiled=True)
    for rank in (2, 4):
        added(model, lora_rank=rank)
        got = train(trainer, model)
        plain = train(trainer_with(tmp_path, added(base(), lora_rank=rank)))
        for name, tensor in plain.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4)
        model.remove_adapter()
    assert type(trainer.model_wrapped) is torch._dynamo.OptimizedModule
    torch.compiler.reset()


def test_a_call_without_a_model_notices_too(tmp_path):
    model = added(base())
    trainer = trainer_with(tmp_path, model)
    trainer.train()
    model.remove_adapter()
    start = trained_state(added(model))
    assert_all_moved(train(trainer), start)


def resize(model):
    scores = {path: 1.0 + number for number, path in enumerate(model.hybrid_adapter.sites)}
    set_dynamic_rank_allocation(model, scores, 2, 8, verbose=False)


def test_sizes_that_changed_between_two_calls(tmp_path):
    """The parameters are the same objects, and the optimizer's memory of them is too small."""
    model = added(base())
    trainer = trainer_with(tmp_path, model)
    trainer.train()
    resize(model)
    start = trained_state(model)
    assert_all_moved(train(trainer), start)


def test_a_given_optimizer_for_other_sizes_is_refused(tmp_path):
    model = added(base())
    optimizer = torch.optim.AdamW(model.hybrid_adapter.parameters())
    trainer = trainer_with(tmp_path, model, (optimizer, None))
    trainer.train()
    resize(model)
    with pytest.raises(AdapterError, match=r"other parameters than hybrid_adapter\."):
        trainer.train()


def test_the_same_adapter_keeps_its_optimizer(tmp_path):
    trainer = trainer_with(tmp_path, added(base()))
    trainer.train()
    before = trainer.optimizer
    trainer.train()
    assert trainer.optimizer is before


@pytest.mark.parametrize("another", [False, True], ids=["adapter", "model"])
def test_a_given_optimizer_for_what_is_gone_is_refused(tmp_path, another):
    model = added(base())
    optimizer = torch.optim.SGD(model.hybrid_adapter.parameters(), 0.1)
    trainer = trainer_with(tmp_path, model, (optimizer, None))
    trainer.train()
    trainer.train()
    if not another:
        model.remove_adapter()
    model = added(base() if another else model)
    before = trained_state(model)
    with pytest.raises(AdapterError, match=r"made for other parameters than hybrid_adapter\."):
        trainer.train(model)
    assert_equal_states(trained_state(model), before)
    trainer.optimizer = torch.optim.SGD(model.hybrid_adapter.parameters(), 0.1)
    assert_all_moved(train(trainer, model), before)


def test_a_given_optimizer_may_have_more_or_less_than_the_model(tmp_path):
    """A loss with parameters of its own; a part of what could train."""
    names = dict(target_modules=["query"], apply_lora_to=["query"])
    model, loss = adapted(bert(), **names), torch.nn.Linear(2, 2)
    part = [*model.hybrid_adapter.lora_b.parameters()]
    whole = [p for p in model.parameters() if p.requires_grad] + [*loss.parameters()]
    for held in (part, whole):
        trainer = trainer_with(tmp_path, model, (torch.optim.SGD(held, 0.1), None))
        trainer._renew_optimizer()
        assert trainer.optimizer.param_groups[0]["params"] == held
