"""What is said before a run begins: what would not be saved, and what is held too narrow."""

import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import ViTConfig, ViTForImageClassification, set_seed

from artemis import AdapterError, load_hybrid_adapter
from artemis.training import RunConfig, Trainer, run_training
from artemis.training import run as run_module
from tests.artemis.models import SMALL, adapted, bert, llama, snapshot
from tests.artemis.training.kit import (
    Sentences,
    assert_equal_states,
    blocks,
    hybrid,
    settings,
    trained_state,
    trainer_for,
)

QUERY = dict(target_modules=["query"], apply_lora_to=["query"])


def classifier(dtype=torch.float32):
    set_seed(1)
    return adapted(bert().to(dtype), **QUERY)


def train(model, directory, autocast: bool = False) -> list[str]:
    """Train, and return what was said of 16 bits."""
    arguments = settings(directory, max_steps=2).arguments(autocast)
    trainer = Trainer(model, arguments, train_dataset=Sentences())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.train()
    found = [warning for warning in seen if "is held in" in str(warning.message)]
    assert all(warning.filename == __file__ for warning in found)
    return [str(warning.message) for warning in found]


# --- what an adapter file does not hold


def unfrozen():
    model = hybrid()
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or "input_layernorm" in name:
            parameter.requires_grad_(True)
    return model


def test_what_would_be_trained_and_not_saved_is_refused(tmp_path):
    model = unfrozen()
    before = snapshot(model)
    with pytest.raises(AdapterError) as error:
        trainer_for(model, tmp_path).train()
    names = "model.embed_tokens.weight, model.layers.0.input_layernorm.weight, "
    assert str(error.value).startswith(names) and "modules_to_save" in str(error.value)
    assert_equal_states(snapshot(model), before)


def test_nothing_that_trains_is_refused(tmp_path):
    model = hybrid().requires_grad_(False)
    with pytest.raises(AdapterError, match="nothing of the model would be trained"):
        trainer_for(model, tmp_path).train()


def test_named_as_heads_they_are_trained_and_saved(tmp_path):
    norms = [f"model.layers.{layer}.input_layernorm" for layer in (0, 1)]
    model = hybrid(modules_to_save=["model.embed_tokens", *norms])
    trainer = trainer_for(model, tmp_path)
    trainer.train()
    trainer.save_model()
    set_seed(1)
    loaded = load_hybrid_adapter(llama(), tmp_path)
    assert_equal_states(snapshot(loaded), snapshot(model))


def test_saving_says_what_is_left_out(tmp_path):
    with pytest.warns(UserWarning, match=r"embed_tokens\.weight.*: not saved, although") as seen:
        unfrozen().save_adapter_parameters(tmp_path)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier().save_adapter_parameters(tmp_path)


# --- 16 bits


def test_heads_in_16_bits_are_warned_of_by_name(tmp_path):
    (sentence,) = train(classifier(torch.bfloat16), tmp_path)
    assert sentence.startswith("the head classifier is held in torch.bfloat16: an update")
    assert "model.classifier.float(), with bf16=True" in sentence


def test_the_remedy_works(tmp_path):
    """A rate of which bf16 loses a part: what did not move there moves in float32."""
    model = classifier(torch.bfloat16)
    model.classifier.float()
    before = model.classifier.weight.detach().clone()
    assert train(model, tmp_path, autocast=True) == []
    assert model.classifier.weight.dtype == torch.float32
    assert not (model.classifier.weight == before).any()


@pytest.mark.parametrize("part", ["the adapter", "the head classifier"])
def test_halves_are_refused_where_the_loss_is_scaled(tmp_path, part):
    model = classifier()
    (model.hybrid_adapter if part == "the adapter" else model.classifier).half()
    trainer = trainer_for(model, tmp_path)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(AdapterError, match=f"{part} is held in torch.float16, which fp16=True"):
        trainer.train()


def run_file(model, directory, monkeypatch, precision: str, **sections) -> dict:
    """Train `model`, which stands for the named one, as a training file says."""
    monkeypatch.setattr(run_module, "load_base", lambda name, dtype, *rest: (model.to(dtype), None))
    monkeypatch.setattr(run_module, "_load_data", lambda *_: (blocks(), blocks(2)))
    training = {"output_dir": str(directory), "max_steps": 2, "batch_size": 2}
    return run_training(RunConfig.from_dict({
        "model": "base",
        "data": {"train": "text.txt", "eval": "held_out.txt"},
        "training": training | {"precision": precision},
        **sections,
    }))  # fmt: skip


@pytest.mark.parametrize(
    ("heads", "bits", "precision", "held"),
    [
        (["lm_head"], None, "bf16", torch.bfloat16),
        (["lm_head", "model.norm"], 8, "bf16", torch.bfloat16),
        (["lm_head"], None, "fp32", torch.float32),
    ],
)
def test_the_training_file_trains_heads_in_float32(
    tmp_path, monkeypatch, heads, bits, precision, held
):
    set_seed(1)
    base = llama()
    names = [f"{head}.weight" for head in heads]
    start = {name: base.get_parameter(name).detach().clone().to(held).float() for name in names}
    adapter = {"lora_rank": 2, "modules_to_save": heads}
    result = run_file(
        base, tmp_path, monkeypatch, precision, base={"bits": bits}, hybrid_adapter=adapter
    )
    assert 3 < result["eval_loss"] < 5
    assert base.model.embed_tokens.weight.dtype == held
    for name, before in start.items():
        after = base.get_parameter(name)
        assert after.dtype == torch.float32
        assert (after == before).float().mean() < 0.02
    set_seed(1)
    loaded = load_hybrid_adapter(llama(), tmp_path)
    assert_equal_states(trained_state(loaded), trained_state(base))


@pytest.mark.parametrize(
    ("precision", "computes"), [("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_the_training_file_trains_a_whole_model_in_float32(
    tmp_path, monkeypatch, precision, computes
):
    """Whatever it computes in: bf16 would lose a part of every small step."""
    base, seen = llama(), []
    base.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    start = trained_state(base)
    run_file(base, tmp_path, monkeypatch, precision)
    assert set(seen) == {computes}
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == start.keys()
    for name, before in start.items():
        assert saved[name].dtype == torch.float32
        moved = (saved[name] != before).float().mean()
        assert moved > (0 if "embed_tokens" in name else 0.98), name  # not every token occurs


# --- what would get no gradient


class Pictures(Dataset):
    """Random pictures with a class each."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        pixels = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": pixels, "labels": index % 3}


def train_vision(directory, **checkpointing):
    """Two steps of a model of pictures; return what moved, of all that trains."""
    set_seed(1)
    config = ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=3)
    names = r".*\.(query|value|q_proj|v_proj)"  # transformers renamed them
    model = adapted(ViTForImageClassification(config), target_modules=names, apply_lora_to=names)
    before = trained_state(model)
    arguments = settings(directory, max_steps=2, checkpointing=bool(checkpointing)).arguments()
    for prefix in ("activation", "gradient"):  # transformers 5.23 renamed it
        setattr(arguments, f"{prefix}_checkpointing_kwargs", checkpointing)
    Trainer(model, arguments, train_dataset=Pictures()).train()
    return {n for n, p in trained_state(model).items() if not torch.equal(p, before[n])}, before


def test_checkpointing_that_hands_no_gradient_on_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="got use_reentrant=True, allowed: False, since no inp"):
        train_vision(tmp_path, use_reentrant=True)
    moved, trained = train_vision(tmp_path, use_reentrant=False)
    assert moved == trained.keys()


def test_reentrant_checkpointing_of_inputs_that_require_a_gradient(tmp_path):
    model = classifier()
    model.enable_input_require_grads()  # as transformers does for tokens
    before = trained_state(model)
    arguments = settings(tmp_path, max_steps=2, checkpointing=True).arguments()
    for prefix in ("activation", "gradient"):
        setattr(arguments, f"{prefix}_checkpointing_kwargs", {"use_reentrant": True})
    Trainer(model, arguments, train_dataset=Sentences()).train()
    assert not any(torch.equal(p, before[name]) for name, p in trained_state(model).items())
