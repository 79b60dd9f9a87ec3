"""Training adapters over a quantized base: the trainer, checkpoints, and the training file."""

import warnings

import pytest
import torch
from transformers import set_seed

from artemis import AdapterError, load_hybrid_adapter, quantize_adapter_model
from artemis.layers.packed_linear import packed_layers
from artemis.training import BaseConfig, RunConfig, Trainer, run_training
from artemis.training import run as run_module
from tests.artemis.models import adapted, llama, snapshot
from tests.artemis.training.kit import (
    assert_equal_states,
    blocks,
    hybrid,
    settings,
    trained_state,
    trainer_for,
)

MINIMAL = {"model": "base", "data": {"train": "text.txt"}, "hybrid_adapter": {"lora_rank": 2}}


def quantized(adapter_bits: int = 32):
    return quantize_adapter_model(hybrid(), adapter_bits=adapter_bits)


def test_two_steps_train_the_adapter_and_nothing_else(tmp_path):
    model = quantized()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the adapter is held")
        trainer = trainer_for(model, tmp_path, max_steps=2)
        trainer.train()
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("hybrid_adapter.") for name in moved)
    trainer.save_model(str(tmp_path / "saved"))
    set_seed(1)
    base = quantize_adapter_model(llama())
    loaded = load_hybrid_adapter(base, tmp_path / "saved", strict=True)
    assert_equal_states(trained_state(loaded), trained_state(model))


@pytest.mark.parametrize(
    ("build", "asked", "sent"),
    [
        (quantized, None, False),
        (quantized, True, True),
        (hybrid, None, True),
        (hybrid, False, False),
    ],
)
def test_what_ddp_sends_round(tmp_path, build, asked, sent):
    """By what accelerate passes to DDP, which leaves out what is DDP's default, True."""
    arguments = settings(tmp_path, max_steps=1).arguments()
    arguments.ddp_broadcast_buffers = asked
    trainer = Trainer(args=arguments, train_dataset=blocks())
    trainer.train(build())
    assert trainer.accelerator.ddp_handler.to_kwargs().get("broadcast_buffers", True) is sent


def test_a_plain_base_after_a_packed_one_has_its_buffers_sent(tmp_path):
    trainer = trainer_for(quantized(), tmp_path, max_steps=1)
    trainer.train()
    trainer.train(hybrid())
    assert "broadcast_buffers" not in trainer.accelerator.ddp_handler.to_kwargs()


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = quantized()
    trainer_for(whole, tmp_path / "whole", max_steps=4).train()
    trainer_for(quantized(), tmp_path / "cut", max_steps=4, save_steps=2).train()
    resumed = quantized()
    trainer = trainer_for(resumed, tmp_path / "cut", max_steps=4, save_steps=2)
    trainer.train(str(tmp_path / "cut" / "checkpoint-2"))
    assert_equal_states(trained_state(resumed), trained_state(whole))


def test_sixteen_bit_adapters_are_warned_of_once(tmp_path):
    trainer = trainer_for(quantized(16), tmp_path, max_steps=2)
    with pytest.warns(UserWarning, match=r"held in torch\.bfloat16") as seen:
        trainer.train()
    assert len([w for w in seen if "the adapter is held" in str(w.message)]) == 1
    assert seen[0].filename == __file__


def test_eight_bit_adapters_are_not_trained(tmp_path):
    with pytest.raises(AdapterError, match="it cannot be trained"):
        trainer_for(quantized(8), tmp_path).train()


def test_the_training_file_quantizes_the_base_and_keeps_adapters_in_32_bits(tmp_path, monkeypatch):
    set_seed(1)
    base = llama()
    monkeypatch.setattr(run_module, "load_base", lambda name, dtype, *rest: (base.to(dtype), None))
    monkeypatch.setattr(run_module, "_load_data", lambda data, tokenizer: (blocks(), None))
    training = {"output_dir": str(tmp_path), "max_steps": 2, "batch_size": 2, "precision": "bf16"}
    values = MINIMAL | {"base": {"bits": 4, "group_size": 16}, "training": training}
    result = run_training(RunConfig.from_dict(values))
    layers = dict(packed_layers(base))
    assert {m.weight.format for m in layers.values()} == {"int4"} and len(layers) == 14
    assert {m.weight.group_size for m in layers.values()} == {16}
    assert {p.dtype for p in base.hybrid_adapter.parameters()} == {torch.float32}
    set_seed(1)
    plain = adapted(llama(), lora_rank=2, adapter_size=64)
    assert result["total_parameters"] == sum(p.numel() for p in plain.parameters())
    assert result["steps"] == 2


def test_a_module_that_is_trained_whole_stays_out_of_the_packed_base(tmp_path, monkeypatch):
    base = llama()
    monkeypatch.setattr(run_module, "load_base", lambda name, dtype, *rest: (base.to(dtype), None))
    monkeypatch.setattr(run_module, "_load_data", lambda data, tokenizer: (blocks(), None))
    head = {"hybrid_adapter": {"lora_rank": 2, "modules_to_save": ["lm_head"]}}
    training = {"output_dir": str(tmp_path), "max_steps": 1, "batch_size": 2}
    values = MINIMAL | head | {"base": {"bits": 8, "include_head": True}, "training": training}
    before = base.lm_head.weight.detach().clone()
    run_training(RunConfig.from_dict(values))
    assert len(list(packed_layers(base))) == 14
    assert not torch.equal(base.lm_head.weight, before)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ({"bit": 8}, "base: unknown key 'bit'; did you mean 'bits'"),
        ({"bits": 16}, "base.bits: got 16, allowed: one of 8, 4, null"),
        ({"bits": True}, "base.bits: got True"),
        ({"bits": 8, "format": "int8"}, "base.format: got 'int8', allowed: one of int, fp8"),
        ({"bits": 4, "format": "fp8"}, "bits, format: got 4, 'fp8'"),
        ({"format": "fp8"}, "base.bits: got None"),
        ({"bits": 4, "group_size": 12}, "base.group_size: got 12"),
        ({"bits": 4, "activation_bits": 8}, "activation_bits: got 8"),
        (8, "base: got 8, allowed: a mapping"),
    ],
)
def test_bad_base_sections(base, words):
    with pytest.raises(AdapterError, match=words):
        RunConfig.from_dict(MINIMAL | {"base": base})


def test_a_model_that_is_trained_whole_keeps_its_bits():
    whole = {key: value for key, value in MINIMAL.items() if key != "hybrid_adapter"}
    for adapter in ({}, {"hybrid_adapter": {"enabled": False}}):
        with pytest.raises(AdapterError, match="got 8 without a hybrid_adapter"):
            RunConfig.from_dict(whole | adapter | {"base": {"bits": 8}})
    assert RunConfig.from_dict(whole).base == BaseConfig()
