"""What `quantize_adapter_model` refuses: one clear error, and nothing changed."""

import pytest
import torch
from torch import nn

from artemis import (
    AdapterError,
    HybridAdapterConfig,
    add_hybrid_adapter_to_model,
    quantize_adapter_model,
)
from artemis.layers.packed_linear import packed_layers
from tests.artemis.models import adapted, assert_same_state, bert, llama, snapshot, tokens
from tests.artemis.quantization.kit import quantized


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(bits=3), "bits, format: got 3, 'int', allowed: 8"),
        (dict(bits=True), "bits, format: got True"),
        (dict(bits=4, format="fp8"), "bits, format: got 4, 'fp8'"),
        (dict(adapter_bits=4), "adapter_bits: got 4, allowed: 32, 16 or 8"),
        (dict(activation_bits=4), "activation_bits: got 4"),
        (dict(bits=4, activation_bits=8), "these are int4"),
        (dict(group_size=32), "group_size: got 32"),
        (dict(bits=4, group_size=12), "group_size: got 12"),
        (dict(bits=4, group_size=32), "down_proj has 48 inputs, allowed: a multiple of 32"),
        (dict(data=[]), "data: got some for int8"),
        (dict(bits=4, data=[]), "data: got no batch"),
        (dict(include_head=1), "include_head: got 1"),
        (dict(leave="lm_head"), "leave: got 'lm_head', allowed: a list"),
        (dict(leave=None), "leave: got None, allowed: a list"),
        (dict(bits=4, data=["a text"]), "data: got a str as a batch, allowed: a mapping"),
        (dict(bits=4, data="a text"), "data: got a str, allowed: a list of batches"),
        (dict(bits=4, data=tokens()), "data: got a Tensor, allowed: a list of batches"),
        (dict(bits=4, data=[{"input_ids": [[3, 4]]}]), "data: the input_ids of a batch are a list"),
        (
            dict(bits=4, data=[{"input_ids": [3, 4]}, {"input_ids": [3]}] * 32),
            "data: examples that make no batch .* of one length",
        ),
        (dict(leave=["head"]), "leave: LlamaForCausalLM has no module head"),
    ],
)
def test_bad_options_change_nothing(options, words):
    model = adapted(llama())
    state, classes = snapshot(model), [type(m) for m in model.modules()]
    with pytest.raises(AdapterError, match=words):
        quantize_adapter_model(model, **options)
    assert_same_state(model, state)
    assert [type(m) for m in model.modules()] == classes
    assert not hasattr(model, "quantization_report")


@pytest.mark.parametrize("value", [torch.nan, 1e39])
def test_an_adapter_that_eight_bits_cannot_hold_is_refused_before_anything_is_packed(value):
    model = adapted(llama()).double()
    with torch.no_grad():
        next(iter(model.hybrid_adapter.up.values()))[0, 0] = value
    with pytest.raises(AdapterError, match=r"adapter_bits: got 8, and the adapter's up\..* holds"):
        quantize_adapter_model(model, adapter_bits=8)
    assert not any(packed_layers(model))
    quantize_adapter_model(model, adapter_bits=32, progress=False)  # no call is half done


def test_a_head_that_is_packed_cannot_train():
    config = HybridAdapterConfig(
        target_modules=["query"], apply_lora_to=["query"], modules_to_save=["pooler", "classifier"]
    )
    model = quantized(bert())
    state = snapshot(model)
    with pytest.raises(AdapterError, match=r"bert\.pooler is packed \(bert\.pooler\.dense\)"):
        add_hybrid_adapter_to_model(model, config)
    assert_same_state(model, state)
    model = quantize_adapter_model(bert(), leave=["bert.pooler"], progress=False)
    assert model.quantization_report.skipped["bert.pooler.dense"] == "left as it is, as asked"
    add_hybrid_adapter_to_model(model, config)
    assert model.bert.pooler.dense.weight.requires_grad


def test_a_module_that_is_left_is_not_the_start_of_a_name():
    """Layer 1 of 11, and not layer 10."""
    model = quantize_adapter_model(
        llama(num_hidden_layers=11), leave=["model.layers.1"], progress=False
    )
    left = [path for path, why in model.quantization_report.skipped.items() if "as asked" in why]
    assert len(left) == 7 and all(path.startswith("model.layers.1.") for path in left)


def test_bad_models_are_refused_and_left():
    twice = quantized(llama())
    with pytest.raises(AdapterError, match="is quantized already"):
        quantize_adapter_model(twice)
    merged = adapted(llama())
    merged.merge_adapter()
    with pytest.raises(AdapterError, match="call unmerge_adapter"):
        quantize_adapter_model(merged)
    broken = llama()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.up_proj holds inf or nan"):
        quantize_adapter_model(broken)
    assert not any(packed_layers(broken))
    packed = llama()
    layer = packed.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(AdapterError, match=r"up_proj is held in torch\.float8_e4m3fn"):
        quantize_adapter_model(packed)
    assert not any(packed_layers(packed))
    with pytest.raises(AdapterError, match="no linear layer to quantize"):
        quantize_adapter_model(nn.Sequential(nn.Embedding(3, 4)))
    with pytest.raises(AdapterError, match="got a int, allowed: a torch.nn.Module"):
        quantize_adapter_model(3)


@pytest.mark.parametrize(
    "wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel]
)
def test_a_wrapped_model_is_refused_and_left(wrap):
    model = llama()
    wrapped = wrap(model)
    attributes = set(vars(wrapped))
    with pytest.raises(AdapterError, match="that is not wrapped yet; compile"):
        quantize_adapter_model(wrapped)
    assert set(vars(wrapped)) == attributes and not any(packed_layers(model))
