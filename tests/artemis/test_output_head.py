"""LoRA on the output head, which some losses pass over: they read its weight themselves."""

import copy
import pickle
import types

import pytest
import torch

from artemis import AdapterError
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
