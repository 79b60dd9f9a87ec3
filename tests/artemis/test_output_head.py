"""The output head: LoRA on it, which some losses pass over; and its product where it has none."""

import copy
import pickle
import types

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from artemis import AdapterError
from artemis.layers import frozen_head as frozen_head_module
from artemis.layers.frozen_head import FrozenHead
from artemis.quantization import quantize_adapter_model
from artemis.training import Trainer
from artemis.training.compiling import can_compile
from tests.artemis.models import adapted, llama, tokens
from tests.artemis.training.kit import blocks, settings

HEAD = dict(target_modules=["q_proj", "lm_head"], apply_lora_to=["q_proj", "lm_head"])


def fused(model):
    """Let the model compute its loss by rows of the head's weight, as TRL and Liger do."""

    def forward(self, input_ids, labels=None, **_):
        hidden, weight = self.base_model(input_ids).last_hidden_state, self.lm_head.weight
        logits = torch.cat(
            [hidden @ weight[i : i + 8].mT for i in range(0, weight.shape[0], 8)], -1
        )
        return types.SimpleNamespace(loss=self.loss_function(logits, labels, logits.shape[-1]))

    model.forward = types.MethodType(forward, model)
    return model


@pytest.mark.parametrize(
    "how", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_loss_that_passes_the_head_over_is_an_error(how):
    model, ids = how(adapted(llama(), **HEAD)).train(), tokens()
    with torch.no_grad():
        model.generate(ids, max_new_tokens=2)  # calls the head, and trains nothing
    fused(model)
    with pytest.raises(AdapterError, match="lm_head was not called"):
        model(ids, labels=ids)
    with model.disable_adapter():
        model(ids, labels=ids)
    model.eval()(ids, labels=ids)
    model.train().remove_adapter()
    model(ids, labels=ids)
    assert not model._forward_hooks and not model.lm_head._forward_pre_hooks


def test_without_an_adapter_on_the_head_such_a_loss_is_right():
    model, ids = adapted(llama(), adapter_dropout=0.0).train(), tokens()
    expected = model(ids, labels=ids).loss
    torch.testing.assert_close(fused(model)(ids, labels=ids).loss, expected)


def test_the_trainers_own_loss_runs_the_head(tmp_path):
    model = adapted(llama(), fill=False, **HEAD)
    Trainer(model, settings(tmp_path).arguments(), train_dataset=blocks()).train()
    assert model.hybrid_adapter.lora_b["lm_head"].any()


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="torch.compile finds no compiler")
def test_compiled_it_is_one_graph_made_once():
    model, ids = adapted(llama(), **HEAD).train(), tokens()
    expected = model(ids, labels=ids).loss
    for site in model.hybrid_adapter.sites.values():
        site.called = False
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            torch.testing.assert_close(compiled(ids, labels=ids).loss, expected)
    torch.compiler.reset()


def test_a_packed_head_says_that_it_has_no_rows():
    model, ids = llama(), tokens()
    quantize_adapter_model(model, bits=8, include_head=True, progress=False)
    with pytest.raises(AdapterError, match="include_head=False"):
        fused(model)(ids, labels=ids)


def frozen_head(dtype=torch.bfloat16) -> FrozenHead:
    head = nn.Linear(32, 24).to(dtype).requires_grad_(False)
    head.__class__ = FrozenHead
    return head


def test_the_heads_class_comes_and_goes_with_the_adapter():
    model, ids = llama().bfloat16(), tokens()
    with torch.no_grad():
        before = model(ids).logits
        adapted(model, fill=False)
        assert type(model.lm_head) is FrozenHead
        for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(ids).logits, before)
    model.remove_adapter()
    assert type(model.lm_head) is nn.Linear


def test_a_head_that_hooks_of_accelerate_go_on_calling():
    """They hold the forward that they found."""
    model, ids = adapted(llama().bfloat16()), tokens()
    add_hook_to_module(model.lm_head, ModelHook())
    model.remove_adapter()
    model(ids).logits.sum().backward()
    remove_hook_from_module(model.lm_head)
    model(ids)
    model = adapted(llama().bfloat16())
    add_hook_to_module(model.lm_head, ModelHook())
    remove_hook_from_module(model.lm_head)
    model.remove_adapter()
    assert type(model.lm_head) is nn.Linear and torch.isfinite(model(ids).logits).all()
    model = llama().bfloat16()
    add_hook_to_module(model.lm_head, ModelHook())
    assert type(adapted(model).lm_head) is nn.Linear


@pytest.mark.parametrize("settings", [dict(impl="reference"), HEAD], ids=["reference", "adapted"])
def test_heads_that_stay_what_they_are(settings):
    assert type(adapted(llama(), **settings).lm_head) is not FrozenHead


def test_through_a_frozen_head_in_training():
    head, x = frozen_head(), torch.randn(3, 7, 32).bfloat16().requires_grad_()
    dy = torch.randn(3, 7, 24).bfloat16()
    y = head(x)
    y.backward(dy)
    wanted = x.double() @ head.weight.double().t() + head.bias.double()
    torch.testing.assert_close(y.double(), wanted, rtol=2**-8, atol=1e-2)
    torch.testing.assert_close(
        x.grad.double(), dy.double() @ head.weight.double(), rtol=2**-8, atol=1e-2
    )


def test_when_a_frozen_head_multiplies_itself(monkeypatch):
    calls = []
    monkeypatch.setattr(
        frozen_head_module, "quantized_linear",
        lambda x, weight, bias: calls.append(x) or nn.functional.linear(x, weight, bias),
    )  # fmt: skip
    head, x = frozen_head(), torch.randn(8, 32).bfloat16().requires_grad_()
    head(x)
    assert len(calls) == 1
    with torch.no_grad():
        head(x)
    head(x.detach()), head(x[:7]), frozen_head(torch.float32)(x.float())
    torch.compile(head, backend="eager")(x)
    head.requires_grad_(True)(x).sum().backward()
    assert len(calls) == 1 and head.weight.grad.any()


def test_adapters_learn_the_same_through_a_frozen_head():
    model, ids = adapted(llama().bfloat16(), adapter_dropout=0.0), tokens(4, 12)
    model(ids, labels=ids).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert found
    model.zero_grad()
    model.lm_head.__class__ = nn.Linear
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if name in found:
            error = (found[name] - parameter.grad).norm()
            assert error <= 0.02 * parameter.grad.norm() + 1e-6, name
