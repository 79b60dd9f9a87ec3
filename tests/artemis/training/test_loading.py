"""The base model as it is loaded: precision and attention."""

import pytest
import torch
import transformers
from transformers import AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from artemis import quantize_adapter_model, save_quantized
from artemis.cli.demo.corpus import byte_pairs
from artemis.errors import AdapterError
from artemis.layers.packed_linear import packed_layers
from artemis.training import attention_for, load_base, resolve_precision
from tests.artemis.models import TOKENS, llama, tokens

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("dtype", "device", "length", "wanted"),
    [
        (torch.bfloat16, CPU, 256, "eager"),
        (torch.bfloat16, CPU, 257, "sdpa"),
        (torch.bfloat16, CPU, None, "sdpa"),
        (torch.bfloat16, GPU, 128, "sdpa"),
        (torch.float32, CPU, 128, "sdpa"),
    ],
)
def test_attention_for(dtype, device, length, wanted):
    assert attention_for(dtype, device, length) == wanted


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_loads_what_was_saved(tmp_path, attention):
    saved, tokenizer = llama(), byte_pairs()
    saved.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, loaded = load_base(str(tmp_path), torch.bfloat16, attention)
    assert model.config._attn_implementation == attention
    assert type(loaded) is type(AutoTokenizer.from_pretrained(tmp_path))
    for name, tensor in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.bfloat16()), name


@pytest.mark.parametrize("quantized", [False, True])
def test_a_model_without_fused_attention_loads(tmp_path, quantized):
    config = transformers.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=32, **TOKENS,
    )  # fmt: skip
    saved, ids = transformers.GPTNeoForCausalLM(config).eval(), tokens()
    if quantized:
        save_quantized(quantize_adapter_model(saved, progress=False), tmp_path)
    else:
        saved.save_pretrained(tmp_path)
    byte_pairs().save_pretrained(tmp_path)
    model, _ = load_base(str(tmp_path), torch.float32, attention_for(torch.float32, CPU, 128))
    assert torch.equal(model(ids).logits, saved(ids).logits)


def test_a_quantized_folder_keeps_the_buffers_that_transformers_keeps_in_float32(tmp_path):
    model, ids = quantize_adapter_model(llama().bfloat16(), progress=False), tokens()
    frequencies = LlamaRotaryEmbedding(model.config).inv_freq
    model.model.rotary_emb.inv_freq = frequencies
    save_quantized(model, tmp_path)
    byte_pairs().save_pretrained(tmp_path)
    loaded, _ = load_base(str(tmp_path), torch.bfloat16)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.model.rotary_emb.inv_freq.dtype is torch.float32
    for dtype in (torch.float32, torch.bfloat16):
        loaded, _ = load_base(str(tmp_path), dtype)
        assert torch.equal(loaded.model.rotary_emb.inv_freq, frequencies)
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        assert {layer.weight.dtype for _, layer in packed_layers(loaded)} == {dtype}


def test_a_folder_without_a_model_is_one_line(tmp_path):
    with pytest.raises(AdapterError, match=r"cannot load the model [^\n]+$"):
        load_base(str(tmp_path), torch.float32)


def test_a_model_that_is_damaged_or_wants_a_package_is_one_line(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path)
    byte_pairs().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AdapterError, match=r"cannot load the model [^\n]+ not fully covered"):
        load_base(str(tmp_path), torch.float32)

    def wanting(*args, **kwargs):
        raise ImportError("Using this format requires a package")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", wanting)
    with pytest.raises(AdapterError, match="cannot load the model .* requires a package"):
        load_base(str(tmp_path), torch.float32)


def test_precision_by_name():
    assert resolve_precision("fp32") is torch.float32
    assert resolve_precision("bf16", CPU) is torch.bfloat16
    assert resolve_precision("auto", CPU) in (torch.float32, torch.bfloat16)
