"""Weights that are not here: offloaded by accelerate, sharded by FSDP, or not loaded yet."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from peft import LoraConfig
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from artemis import AdapterError, export_adapter, load_hybrid_adapter, read_adapter
from artemis.quantization import quantize_adapter_model
from tests.artemis.models import adapted, assert_same_state, llama, snapshot, tokens

LORA = dict(target_modules=["q_proj", "v_proj"], apply_lora_to=["q_proj", "v_proj"])
PLACES = {
    name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
} | {"hybrid_adapter": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}


@pytest.fixture
def offload(tmp_path):
    """Offload the second layer to the disk: its weights are on `meta` between calls."""

    def offloaded(model):
        options = dict(main_device="cpu", offload_dir=tmp_path / "disk", force_hooks=True)
        dispatch_model(model, PLACES, **options)
        assert any(p.is_meta for p in model.model.layers[1].parameters())
        return model

    return offloaded


@pytest.fixture
def one_process():
    """A group of processes that is this one alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def loads_without_a_word(base, path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_hybrid_adapter(base, path, strict=True)


@pytest.mark.parametrize("bits", [None, 8])
def test_an_offloaded_models_adapter_is_saved_and_loaded(bits, offload, tmp_path):
    base, ids = llama(), tokens()
    model = adapted(copy.deepcopy(base))
    if bits:
        quantize_adapter_model(model, bits=bits, adapter_bits=32, progress=False)
    expected = read_saved(model, tmp_path / "before")
    logits = model(ids).logits
    offload(model)
    assert read_saved(model, tmp_path / "after") == expected
    model.load_adapter_parameters(tmp_path / "before", strict=True)
    torch.testing.assert_close(model(ids).logits, logits)
    loads_without_a_word(base, tmp_path / "after")


def read_saved(model, path):
    model.save_adapter_parameters(path)
    return read_adapter(path).base


def test_what_is_offloaded_is_not_merged(offload):
    model, ids = adapted(llama(), **LORA), tokens()
    expected = model(ids).logits
    report = offload(model).merge_adapter()
    assert set(report.active) == {p for p in model.hybrid_adapter.sites if ".1." in p}
    assert all("brought for each call" in reason for reason in report.active.values())
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_is_offloaded_is_not_unmerged(offload):
    model, ids = adapted(llama(), **LORA), tokens()
    model.merge_adapter()
    expected = offload(model)(ids).logits
    with pytest.raises(AdapterError, match=r"model\.layers\.1\.self_attn\.q_proj.* offloaded"):
        model.unmerge_adapter()
    assert torch.equal(model(ids).logits, expected)


def test_an_offloaded_models_adapter_is_removed_after_the_hooks(offload):
    base, ids = llama(), tokens()
    model = offload(adapted(copy.deepcopy(base)))
    state, expected = model.hybrid_adapter.state_dict(), model(ids).logits
    with pytest.raises(AdapterError, match=r"layers\.0.* forward of its own.*remove_hook_from"):
        model.remove_adapter()
    assert torch.equal(model(ids).logits, expected) and len(state) > 0
    remove_hook_from_submodules(model)
    model.remove_adapter()
    assert torch.equal(model(ids).logits, base(ids).logits)


def test_a_base_that_is_not_loaded_takes_no_adapter(tmp_path):
    adapted(llama(), **LORA).save_adapter_parameters(tmp_path)
    with torch.device("meta"):
        base = llama()
    for add in (lambda: adapted(base, **LORA), lambda: load_hybrid_adapter(base, tmp_path)):
        with pytest.raises(AdapterError, match=r"model\.embed_tokens\.weight.* meta device"):
            add()
    assert not hasattr(base, "hybrid_adapter")


def test_a_sharded_adapter_is_saved_once_it_is_whole(one_process, tmp_path):
    base = llama()
    model = adapted(copy.deepcopy(base), shared_parameters=False)  # a gain is no vector to cut
    whole = adapted(copy.deepcopy(base), shared_parameters=False)
    state = snapshot(model.hybrid_adapter)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=dist.init_device_mesh("cpu", (1,)))
    for refused in (model.save_adapter_parameters, lambda path: export_adapter(model, path)):
        with pytest.raises(AdapterError, match=r"hybrid_adapter\.lora_a.*full state dict"):
            refused(tmp_path)
    options = StateDictOptions(full_state_dict=True)
    whole.load_state_dict(get_model_state_dict(model, options=options))
    whole.save_adapter_parameters(tmp_path)
    assert_same_state(loads_without_a_word(base, tmp_path).hybrid_adapter, state)


def test_another_adapter_on_top_makes_no_other_base(tmp_path):
    base = llama()
    model = adapted(copy.deepcopy(base), **LORA)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.save_adapter_parameters(tmp_path)
    loads_without_a_word(base, tmp_path)
