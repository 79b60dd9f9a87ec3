"""The trainer's loss is transformers' own, to the rounding of its parts."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from artemis.training import causal_loss, lean_loss

CONFIG = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, vocab_size=37,
)  # fmt: skip


def gradients(loss, dtype, **options):
    torch.manual_seed(0)
    logits = (torch.randn(2, 9, 37) * 3).to(dtype).requires_grad_()
    labels = torch.randint(37, (2, 9))
    labels[0, 4:] = -100
    value = loss(logits=logits, labels=labels, vocab_size=37, **options)
    value.backward()
    return value.detach(), logits.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_items_in_batch": 5},
        {"num_items_in_batch": torch.tensor(5)},
        {"ignore_index": 3},
        {"shift_labels": torch.arange(18).view(2, 9)},
    ],
    ids=str,
)
def test_agrees_with_transformers(options, dtype):
    if "ignore_index" in options:  # then -100 is no class: transformers refuses it as well
        options = options | {"shift_labels": torch.arange(18).view(2, 9)}
    got, grad = gradients(causal_loss, dtype, **options)
    wanted, wanted_grad = gradients(ForCausalLMLoss, dtype, **options)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    rtol = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(grad, wanted_grad, rtol=rtol, atol=1e-8)


def test_serves_a_model_and_gives_its_own_loss_back():
    model = AutoModelForCausalLM.from_config(CONFIG)
    batch = torch.randint(37, (2, 9))
    wanted = model(input_ids=batch, labels=batch).loss
    with lean_loss(model):
        assert model.loss_function is causal_loss
        loss = model(input_ids=batch, labels=batch).loss
    assert model.loss_function is ForCausalLMLoss
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(KeyError), lean_loss(model):
        raise KeyError
    assert model.loss_function is ForCausalLMLoss


def test_leaves_another_loss_alone():
    own = AutoModelForCausalLM.from_config(CONFIG)
    own.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    others = [
        own,
        BertForSequenceClassification(
            BertConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
            )
        ),
        torch.nn.Linear(2, 2),
    ]
    for model in others:
        before = getattr(model, "loss_function", None)
        with lean_loss(model):
            assert getattr(model, "loss_function", None) == before
