"""The base model as it is loaded: precision and attention."""

import pytest
import torch
from transformers import AutoTokenizer

from artemis.cli.demo.corpus import byte_pairs
from artemis.errors import AdapterError
from artemis.training import attention_for, load_base, resolve_precision
from tests.artemis.models import llama

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


def test_a_folder_without_a_model_is_one_line(tmp_path):
    with pytest.raises(AdapterError, match=r"cannot load the model [^\n]+$"):
        load_base(str(tmp_path), torch.float32)


def test_precision_by_name():
    assert resolve_precision("fp32") is torch.float32
    assert resolve_precision("bf16", CPU) is torch.bfloat16
    assert resolve_precision("auto", CPU) in (torch.float32, torch.bfloat16)
