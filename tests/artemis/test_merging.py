"""Merging folds what it can, says what stays, and comes apart bit for bit."""

import copy
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import TrainingArguments

from artemis import AdapterError
from artemis.saving.adapter_file import PARAMETERS_FILE
from artemis.training import Trainer
from tests.artemis.models import adapted, assert_same_state, bert, gpt2, llama, snapshot, tokens

LINEAR = dict(activation="identity")
GPT2 = dict(target_modules=["c_attn", "c_fc"], apply_lora_to=["c_attn"])
BERT = dict(target_modules=["query", "value", "intermediate.dense"])
BERT["apply_lora_to"] = ["query", "value"]


@pytest.mark.parametrize(
    "build, settings, folded, active",
    [
        pytest.param(llama, {}, 8, 6, id="gelu-stays"),
        pytest.param(llama, LINEAR, 8, 6, id="biases-have-no-place"),
        pytest.param(llama, LINEAR | {"adapter_bias": False}, 14, 0, id="linear-bottleneck"),
        pytest.param(llama, {"target_modules": ["q_proj", "mlp"]}, 2, 2, id="block-stays"),
        pytest.param(gpt2, GPT2 | LINEAR, 4, 0, id="conv1d-with-biases"),
        pytest.param(bert, BERT | LINEAR | {"adapter_bias": False}, 6, 0, id="bert-no-biases"),
        pytest.param(bert, BERT | LINEAR | {"shared_parameters": False}, 6, 0, id="bert-own"),
    ],
)
def test_a_merged_model_computes_the_same_and_unmerges_bit_for_bit(build, settings, folded, active):
    model, ids = adapted(build(), **settings), tokens()
    state = snapshot(model)
    expected = model(ids).logits

    report = model.merge_adapter()
    assert (len(report.merged), len(report.active)) == (folded, active)
    assert set(report.merged) | set(report.active) == set(model.hybrid_adapter.sites)
    assert all(f"{path}: {reason}" in str(report) for path, reason in report.active.items())
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    for path in report.merged:  # the weight itself holds the adapter now
        assert not torch.equal(model.state_dict()[f"{path}.weight"], state[f"{path}.weight"])

    merged = snapshot(model)
    assert model.merge_adapter() == report  # again: nothing is added twice
    assert_same_state(model, merged)
    model.unmerge_adapter()
    model.unmerge_adapter()
    assert_same_state(model, state)
    assert torch.equal(model(ids).logits, expected)


def test_a_merged_layer_is_the_base_layer():
    """What was folded costs nothing: the plain linear layer runs, and its weight alone is right."""
    model = adapted(llama(), shared_parameters=False, scaling_factor=2.0).double()
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(3, 32, dtype=torch.float64)
    t, w = layer.adapter.bank.tensors(layer.adapter.layout), layer.weight.clone()
    model.merge_adapter()
    torch.testing.assert_close(layer.weight, w + 2.0 * t["lora_b"] @ t["lora_a"])
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight))


def test_a_bf16_weight_is_rounded_once():
    model = adapted(llama().to(torch.bfloat16), shared_parameters=False)
    layer = model.model.layers[0].self_attn.q_proj
    t = {role: v.double() for role, v in layer.adapter.bank.tensors(layer.adapter.layout).items()}
    exact = layer.weight.double() + 0.5 * t["lora_b"] @ t["lora_a"]
    model.merge_adapter()
    wrong = (layer.weight.double() - exact).abs() > 0.5000001 * 2**-7 * exact.abs()
    assert not wrong.any()


def test_a_tied_weight_stays_as_it_is():
    model = llama(tie_word_embeddings=True)
    adapted(model, target_modules=["q_proj", "lm_head"], apply_lora_to=["q_proj", "lm_head"])
    ids = tokens()
    expected = model(ids).logits
    report = model.merge_adapter()
    assert report.active == {"lm_head": "the weight is tied to model.embed_tokens.weight"}
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_while_merged_saving_saves_the_adapter_and_the_base_is_known(tmp_path):
    model = adapted(llama())
    model.save_adapter_parameters(tmp_path / "plain")
    model.merge_adapter()
    model.save_adapter_parameters(tmp_path / "merged")
    first, second = (
        (tmp_path / name / "hybrid_adapter.safetensors").read_bytes()
        for name in ("plain", "merged")
    )
    assert first == second


def test_while_merged_loading_and_disabling_are_refused(tmp_path):
    model = adapted(llama())
    model.save_adapter_parameters(tmp_path)
    model.merge_adapter()
    state = snapshot(model)
    with pytest.raises(AdapterError, match=r"call unmerge_adapter\(\) first"):
        model.load_adapter_parameters(tmp_path)
    with pytest.raises(AdapterError, match=r"unmerge_adapter\(\) first"), model.disable_adapter():
        pass
    assert_same_state(model, state)


def test_removing_a_merged_adapter_gives_the_base_back():
    model = llama()
    state = snapshot(model)
    adapted(model).merge_adapter()
    model.remove_adapter()
    assert_same_state(model, state)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_a_copy_of_a_merged_model_unmerges_by_itself():
    model = adapted(llama())
    state = snapshot(model)
    model.merge_adapter()
    merged = snapshot(model)
    other = copy.deepcopy(model)
    other.unmerge_adapter()
    assert_same_state(other, state)
    assert_same_state(model, merged)


def test_merging_also_works_with_a_trained_head():
    model = llama(transformers.LlamaForSequenceClassification, num_labels=3)
    ids = tokens()
    adapted(model)
    expected = model(ids).logits
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


def normed(layer):
    with warnings.catch_warnings():  # it is deprecated, and in use
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Halved())


def undone(layer):
    if parametrize.is_parametrized(layer):
        parametrize.remove_parametrizations(layer, "weight")
    elif prune.is_pruned(layer):
        prune.remove(layer, "weight")
    else:
        nn.utils.remove_weight_norm(layer)


@pytest.mark.parametrize("change", [pruned, normed, parametrized])
def test_a_weight_that_is_worked_out_at_each_forward_keeps_its_adapter(change):
    model, ids = adapted(llama()), tokens()
    path = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(path)
    change(layer)
    model.unmerge_adapter()  # nothing is merged
    expected = model(ids).logits
    report = model.merge_adapter()
    assert report.active[path].startswith("the weight is worked out at each forward")
    assert len(report.merged) == 7
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(ids).logits, expected)

    with model.disable_adapter():
        base = model(ids).logits
    model.remove_adapter()
    assert isinstance(layer, nn.Linear) and "Adapted" not in type(layer).__name__
    torch.testing.assert_close(model(ids).logits, base)
    undone(layer)
    assert type(layer) is nn.Linear
    torch.testing.assert_close(model(ids).logits, base)


def test_a_copy_keeps_its_adapter_when_a_parametrized_one_loses_it():
    model, ids = adapted(llama()), tokens()
    layer = model.model.layers[0].self_attn.q_proj
    parametrized(layer)
    other, expected = copy.deepcopy(model), model(ids).logits
    model.remove_adapter()
    assert torch.equal(other(ids).logits, expected)


@pytest.mark.parametrize("change", [pruned, normed, parametrized])
def test_a_merged_weight_that_has_no_place_any_more(change):
    model = adapted(llama())
    state = snapshot(model)
    model.merge_adapter()
    layer = model.model.layers[0].self_attn.q_proj
    change(layer)
    merged = snapshot(model)
    assert "model.layers.0.self_attn.q_proj" in model.merge_adapter().merged  # as before
    for method in (model.unmerge_adapter, model.remove_adapter):
        with pytest.raises(
            AdapterError, match=r"layers\.0\.self_attn\.q_proj: .* cannot be put back"
        ):
            method()
        assert_same_state(model, merged)
    undone(layer)
    model.unmerge_adapter()
    assert_same_state(model, state)


def test_a_bias_that_is_worked_out_or_tied_keeps_its_bottleneck():
    settings = LINEAR | dict(target_modules=["c_attn", "c_fc"], apply_lora_to=["c_attn"])
    model, ids = gpt2(), tokens()
    model.transformer.h[1].mlp.c_fc.bias = model.transformer.h[0].mlp.c_fc.bias
    adapted(model, **settings)
    prune.l1_unstructured(model.transformer.h[0].attn.c_attn, "bias", 0.5)
    expected, state = model(ids).logits, snapshot(model)
    report = model.merge_adapter()
    assert report.merged == ("transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn")
    assert report.active == {
        "transformer.h.0.mlp.c_fc": "the bias is tied to transformer.h.1.mlp.c_fc.bias",
        "transformer.h.1.mlp.c_fc": "the bias is tied to transformer.h.0.mlp.c_fc.bias",
    }
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert_same_state(model, state)

    model = adapted(gpt2(), **settings)
    prune.l1_unstructured(model.transformer.h[0].mlp.c_fc, "bias", 0.5)
    expected = model(ids).logits
    (reason,) = model.merge_adapter().active.values()
    assert reason.startswith("the bias is worked out at each forward")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_merging_while_disabled_is_refused():
    model = adapted(llama())
    state = snapshot(model)
    with model.disable_adapter(), pytest.raises(AdapterError, match="the adapter is switched off"):
        model.merge_adapter()
    assert_same_state(model, state)


HEAD = dict(target_modules=["q_proj", "lm_head"], apply_lora_to=["q_proj", "lm_head"])


def test_a_replaced_head_is_named_before_anything_changes(tmp_path):
    model = adapted(llama(), **HEAD)
    old = model.lm_head
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.lm_head is not old
    resized = snapshot(model)
    for method in (
        model.merge_adapter,
        model.print_trainable_parameters,
        Trainer(model, TrainingArguments(tmp_path / "run", use_cpu=True)).train,
    ):
        with pytest.raises(AdapterError, match="^lm_head: replaced after the adapter was added"):
            method()
        assert_same_state(model, resized)


def test_an_adapter_whose_head_was_replaced_is_saved_and_warned_of(tmp_path):
    """Beside the head much may have been trained."""
    model = adapted(llama(), **HEAD)
    model.save_adapter_parameters(tmp_path / "before")
    model.resize_token_embeddings(70, mean_resizing=False)
    with pytest.warns(UserWarning, match="^lm_head: replaced after .*; saved is what it was"):
        model.save_adapter_parameters(tmp_path / "after")
    before, after = (load_file(tmp_path / name / PARAMETERS_FILE) for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_whose_head_was_replaced_is_removed():
    model = llama()
    state, before = snapshot(model), set(vars(model))
    adapted(model, **HEAD)
    model.resize_token_embeddings(70, mean_resizing=False)

    model.remove_adapter()
    assert set(vars(model)) == before
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    for name in state.keys() - {"lm_head.weight", "model.embed_tokens.weight"}:
        assert torch.equal(model.state_dict()[name], state[name]), name
    assert all(p.requires_grad for p in model.parameters())
    adapted(model, **HEAD).print_trainable_parameters()


def test_a_head_that_is_put_back_is_the_adapted_one(tmp_path):
    model, ids = adapted(llama(), **HEAD), tokens()
    expected, head = model(ids).logits, model.lm_head
    model.lm_head = nn.Linear(32, 64)
    model.lm_head = head
    model.save_adapter_parameters(tmp_path)
    assert len(model.merge_adapter().merged) == 3
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_merged_head_that_was_replaced_is_not_forgotten():
    model = adapted(llama(), **HEAD)
    state = snapshot(model)
    model.merge_adapter()
    head, model.lm_head = model.lm_head, nn.Linear(32, 64)
    merged = snapshot(model)
    for method in (model.unmerge_adapter, model.remove_adapter):
        with pytest.raises(AdapterError, match="lm_head: replaced, .* cannot be put back"):
            method()
        assert_same_state(model, merged)
    model.lm_head = head
    model.unmerge_adapter()
    assert_same_state(model, state)


@pytest.mark.parametrize("target", ["q_proj", "mlp"])
def test_layers_taken_out_of_the_model(target):
    """The second layer stands where the first one stood, adapted by its own adapter."""
    model, ids = llama(), tokens()
    kept = copy.deepcopy(model)
    for m in (model, kept):
        m.config.num_hidden_layers = 1
    del kept.model.layers[0]
    adapted(model, target_modules=["q_proj", target], apply_lora_to=["q_proj"])
    del model.model.layers[0]
    model.model.layers[0].self_attn.layer_idx = kept.model.layers[0].self_attn.layer_idx = 0
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.self_attn\.q_proj, .*: replaced"):
        model.merge_adapter()
    model.remove_adapter()
    assert torch.equal(model(ids).logits, kept(ids).logits)


def test_a_module_that_is_wrapped_in_its_place_is_in_its_place():
    """As torch.compile and wrappers for checkpointing do it."""

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    model, ids = adapted(llama(), target_modules=["q_proj", "mlp"]), tokens()
    expected, layer = model(ids).logits, model.model.layers[1]
    layer.mlp, layer.self_attn.q_proj = Wrapper(layer.mlp), Wrapper(layer.self_attn.q_proj)
    report = model.merge_adapter()
    assert report.merged == ("model.layers.0.self_attn.q_proj",)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    model.remove_adapter()
    assert type(layer.self_attn.q_proj.inner) is nn.Linear
    assert not layer.mlp.inner._forward_hooks


def test_a_state_says_whether_it_is_merged(tmp_path):
    """Else LoRA would count twice, or not at all, in the model that it is loaded into."""
    model, plain, ids = adapted(llama()), adapted(llama()), tokens()
    own = snapshot(model)
    model.merge_adapter()
    merged, expected = snapshot(model), model(ids).logits
    path = tmp_path / "merged.safetensors"
    save_file(merged, path)
    for state in (merged, copy.deepcopy(model).state_dict(), load_file(path)):
        with pytest.raises(RuntimeError, match=r"Unexpected key.*hybrid_adapter\.merged"):
            plain.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*hybrid_adapter\.merged"):
        model.load_state_dict(own)

    plain.merge_adapter()
    plain.load_state_dict(merged)
    assert torch.equal(plain(ids).logits, expected)
    plain.unmerge_adapter()
    assert plain.state_dict().keys() == own.keys()


def test_a_merged_model_is_saved_as_a_plain_one(tmp_path):
    names = ["q_proj", "v_proj"]
    model, ids = adapted(llama(), target_modules=names, apply_lora_to=names), tokens()
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
