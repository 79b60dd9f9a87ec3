"""What `quantize_adapter_model` leaves as it was, and why."""

import pytest
import torch
import transformers
from torch import nn

from artemis import load_quantized, save_quantized
from tests.artemis.models import llama, t5, tokens
from tests.artemis.quantization.kit import quantized, relative


@torch.no_grad()
def beyond_fp16(model: nn.Module) -> nn.Module:
    """A T5 whose feed-forward layers put out numbers that fp16 cannot hold, as the real ones do."""
    for block in model.encoder.block:
        layer = block.layer[-1].DenseReluDense
        layer.wi.weight.mul_(100)
        layer.wo.weight.mul_(3000)
    return model


def test_a_layer_that_transformers_keeps_in_float32_stays_so(tmp_path):
    base = beyond_fp16(t5())
    base.save_pretrained(tmp_path / "base")
    load = transformers.T5ForConditionalGeneration.from_pretrained
    model = quantized(load(tmp_path / "base", dtype=torch.float16).eval(), activation_bits=16)
    report, ids = model.quantization_report, tokens()
    kept = {path for path, reason in report.skipped.items() if "keeps it in float32" in reason}
    assert kept == {path for path, _ in base.named_modules() if path.endswith(".wo")}
    inputs = dict(input_ids=ids, decoder_input_ids=ids)
    hidden = base(**inputs).encoder_last_hidden_state, base.encoder(ids, output_hidden_states=True)
    assert max(state.abs().max() for state in hidden[1].hidden_states) > 65504
    with torch.no_grad():
        got, wanted = model(**inputs).logits, base(**inputs).logits
    assert relative(got.float(), wanted) < 0.05

    save_quantized(model, tmp_path / "packed")
    again = load_quantized(model.config, tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_in_the_models_own_dtype_is_packed(dtype):
    model = quantized(t5().to(dtype))
    assert not any(path.endswith(".wo") for path in model.quantization_report.skipped)


def test_convolutions_and_embeddings_are_not_taken_for_experts():
    class Position(nn.Module):
        def __init__(self):
            super().__init__()
            self.where = nn.Parameter(torch.zeros(1, 9, 4))  # ViT's
            self.convolution = nn.Conv2d(3, 4, 2)
            self.weighed = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 2))

    model = llama()
    model.position = Position()
    assert set(quantized(model).quantization_report.skipped) == {"lm_head"}
