"""A call that is interrupted leaves a model that computes, and that the same call finishes."""

import copy

import pytest
import torch
from torch import nn

from artemis import AdapterError, quantize_adapter_model
from artemis.layers.packed_linear import packed_layers
from artemis.quantization import adapters
from artemis.quantization import quantize as quantize_module
from tests.artemis.models import adapted, assert_same_state, llama, snapshot, tokens
from tests.artemis.quantization.kit import interrupted_at

OPTIONS = dict(bits=4, adapter_bits=8, activation_bits=16)


PLACES = {
    "between layers": (quantize_module, "pack", 5, lambda *args: True, 4),
    "within a layer": (nn.Module, "register_buffer", 5, lambda *args: "weight_scale" in args, 4),
    "in the adapter": (adapters.PackedTable, "__init__", 2, lambda *args: True, 14),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_same_call_goes_on(place, monkeypatch):
    owner, name, number, counts, packed = PLACES[place]
    model, ids = adapted(llama()), tokens()
    whole = quantize_adapter_model(copy.deepcopy(model), **OPTIONS)
    expected = model(ids).logits
    replacement = interrupted_at(number, getattr(owner, name), counts)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, replacement)
        with pytest.raises(KeyboardInterrupt):
            quantize_adapter_model(model, **OPTIONS)
    assert len(list(packed_layers(model))) == packed
    assert (model(ids).logits - expected).norm() < 0.5 * expected.norm()
    state = snapshot(model)
    with pytest.raises(AdapterError, match="half quantized, by an interrupted call with"):
        quantize_adapter_model(model, **OPTIONS | dict(bits=8))
    assert_same_state(model, state)
    quantize_adapter_model(model, **OPTIONS)
    assert_same_state(model, snapshot(whole))
    assert model.quantization_report == whole.quantization_report
    assert torch.equal(model(ids).logits, whole(ids).logits)
    with pytest.raises(AdapterError, match="is quantized already"):
        quantize_adapter_model(model, **OPTIONS)
