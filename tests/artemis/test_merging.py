"""Merging folds what it can, says what stays, and comes apart bit for bit."""

import copy

import pytest
import torch
import transformers

from artemis import AdapterError
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
