"""Saving and loading: nothing lost, nothing foreign accepted, nothing half done."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import artemis
from artemis import AdapterError, load_hybrid_adapter, read_adapter
from tests.artemis.models import (
    adapted,
    assert_same_state,
    bert,
    gpt2,
    llama,
    snapshot,
    tokens,
)

FILE = "hybrid_adapter.safetensors"
CONFIG = "hybrid_adapter_config.json"
SETTINGS = [
    pytest.param(llama, {}, id="shared"),
    pytest.param(llama, dict(shared_parameters=False, adapter_bias=False), id="own"),
    pytest.param(llama, dict(target_modules=["q_proj", "mlp"]), id="blocks"),
    pytest.param(
        gpt2, dict(target_modules=["c_attn", "c_fc"], apply_lora_to=["c_attn"]), id="gpt2"
    ),
    pytest.param(bert, dict(target_modules=["query"], apply_lora_to=["query"]), id="head"),
]


def saved(path: Path, build=llama, seed: int = 1, **settings):
    """A base, and the adapter trained on a copy of it, saved at `path`."""
    torch.manual_seed(seed)
    base = build()
    model = adapted(copy.deepcopy(base), **settings)
    for head in model.hybrid_adapter.heads:
        for parameter in model.get_submodule(head).parameters():
            torch.nn.init.normal_(parameter)  # heads are trained too
    model.save_adapter_parameters(path)
    return base, model


@pytest.mark.parametrize("build, settings", SETTINGS)
def test_a_saved_adapter_loads_onto_the_base_bit_for_bit(build, settings, tmp_path):
    base, model = saved(tmp_path, build, **settings)
    rng = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_hybrid_adapter(base, tmp_path)
    assert loaded is base and torch.equal(torch.get_rng_state(), rng)
    assert_same_state(loaded, snapshot(model))
    assert loaded.hybrid_adapter.config == model.hybrid_adapter.config
    ids = tokens()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == flags


@pytest.mark.parametrize("build, settings", SETTINGS)
def test_a_saved_adapter_loads_into_a_model_that_has_one(build, settings, tmp_path):
    base, model = saved(tmp_path, build, **settings)
    other = adapted(base, **settings)
    assert other.load_adapter_parameters(tmp_path / FILE) is None
    assert_same_state(other, snapshot(model))


def test_a_file_holds_the_adapter_and_the_heads_and_nothing_of_the_base(tmp_path):
    _, model = saved(tmp_path, bert, target_modules=["query"], apply_lora_to=["query"])
    bank = {f"hybrid_adapter.{name}" for name, _ in model.hybrid_adapter.named_parameters()}
    assert set(load_file(tmp_path / FILE)) == bank | {"classifier.weight", "classifier.bias"}
    assert {path.name for path in tmp_path.iterdir()} == {FILE, CONFIG}


def test_saving_touches_no_other_file(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    saved(tmp_path)
    saved(tmp_path, seed=2)
    assert {path.name for path in tmp_path.iterdir()} == {FILE, CONFIG, "notes.txt"}
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_header_alone_is_enough_and_the_readable_copy_repeats_it(tmp_path):
    base, model = saved(tmp_path)
    with safe_open(tmp_path / FILE, "pt") as file:
        header = json.loads(file.metadata()["hybrid_adapter"])
    assert header.pop("base_samples")  # numbers for no one to read
    assert json.loads((tmp_path / CONFIG).read_text()) == header
    (tmp_path / CONFIG).unlink()
    load_hybrid_adapter(base, tmp_path)
    assert header["library_version"] == artemis.__version__
    assert header["base"]["class_name"] == "LlamaForCausalLM"
    assert "impl" not in header["config"]  # the machine's choice, not the adapter's


class TwiceTheSame(nn.Module):
    """A head whose layers are one layer."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.head = nn.ModuleList([nn.Linear(8, 2)] * 2)


def test_a_head_that_shares_tensors_within_itself_is_saved_once_and_comes_back(tmp_path):
    settings = dict(target_modules=["q_proj"], modules_to_save=["head"])
    base, model = saved(tmp_path, TwiceTheSame, **settings)
    heads = {name for name in load_file(tmp_path / FILE) if name.startswith("head.")}
    assert heads == {"head.0.weight", "head.0.bias"}
    loaded = load_hybrid_adapter(copy.deepcopy(base), tmp_path)
    assert_same_state(loaded, snapshot(model))
    assert loaded.head[0].weight is loaded.head[1].weight and loaded.head[0].weight.requires_grad
    adapted(base, **settings)
    base.load_adapter_parameters(tmp_path)
    assert_same_state(base, snapshot(model))


def test_read_adapter_tells_what_a_file_holds(tmp_path):
    _, model = saved(tmp_path)
    file = read_adapter(tmp_path)
    assert file.parameters == sum(p.numel() for p in model.hybrid_adapter.parameters())
    assert file.config == model.hybrid_adapter.config
    rows = {row.path: row for row in file.modules()}
    assert list(rows) == list(model.hybrid_adapter.sites)
    row = rows["model.layers.1.self_attn.k_proj"]  # A 4 x 32 shared; B 16 x 4 and a gain own
    assert (row.kind, row.size, row.shared, row.own) == ("lora", 4, 128, 65)
    row = rows["model.layers.1.mlp.down_proj"]  # down and up 8 x 32 each; biases 8 + 32, gain
    assert (row.kind, row.size, row.shared, row.own) == ("bottleneck", 8, 512, 41)


def test_16_bit_parameters_load_into_32(tmp_path):
    base, model = saved(tmp_path)
    model.to(torch.bfloat16).save_adapter_parameters(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the base in bf16 is known as the same base
        load_hybrid_adapter(base, tmp_path)
    for name, parameter in base.hybrid_adapter.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, model.hybrid_adapter.get_parameter(name).float())


def test_ranks_of_single_modules_come_back(tmp_path):
    """Each module's own rank is in the file, whatever the configuration's is."""
    base, model = saved(tmp_path, shared_parameters=False, target_modules=["q_proj"])
    tensors, header = parts(tmp_path)
    header["sites"][0]["size"] = 2
    key = "model/layers/0/self_attn/q_proj"
    tensors[f"hybrid_adapter.lora_a.{key}"] = tensors[f"hybrid_adapter.lora_a.{key}"][:2].clone()
    tensors[f"hybrid_adapter.lora_b.{key}"] = tensors[f"hybrid_adapter.lora_b.{key}"][:, :2].clone()
    rewrite(tmp_path, tensors, header)
    load_hybrid_adapter(base, tmp_path)
    ranks = [site.spec.size for site in base.hybrid_adapter.sites.values()]
    assert ranks == [2, 4]
    assert base.hybrid_adapter.lora_a[key].shape == (2, 32)
    with pytest.raises(AdapterError, match="q_proj has lora 4 .*, in the file lora 2"):
        model.load_adapter_parameters(tmp_path)


def parts(path: Path):
    with safe_open(path / FILE, "pt") as file:
        header = json.loads(file.metadata()["hybrid_adapter"])
    return load_file(path / FILE), header


def rewrite(path: Path, tensors: dict, header) -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors, path / FILE, {"hybrid_adapter": text})


def damage(change):
    """A way to spoil a saved adapter: `change(tensors, header)` in place."""

    def apply(path: Path):
        tensors, header = parts(path)
        result = change(tensors, header)
        rewrite(path, tensors, header if result is None else result)

    return apply


def truncate(path: Path):
    content = (path / FILE).read_bytes()
    (path / FILE).write_bytes(content[: len(content) // 2])


NAME = "hybrid_adapter.lora_a.q_proj/32x32"
BAD_FILES = {
    "truncated": (truncate, "damaged, or no safetensors file"),
    "empty": (lambda path: (path / FILE).write_bytes(b""), "damaged, or no safetensors file"),
    "text": (lambda path: (path / FILE).write_text("hello world"), "damaged, or no safetensors"),
    "foreign": (lambda path: save_file({"w": torch.ones(2)}, path / FILE), "not a hybrid adapter"),
    "later": (damage(lambda t, h: h.update(format_version=2)), "format version 2, allowed: 1"),
    "no-json": (damage(lambda t, h: "{"), "header is damaged"),
    "no-object": (damage(lambda t, h: "[1]"), "header is damaged"),
    "no-base": (damage(lambda t, h: h.__delitem__("base")), "header is damaged"),
    "bad-site": (damage(lambda t, h: h["sites"][0].update(size="4")), "header is damaged"),
    "bad-kind": (damage(lambda t, h: h["sites"][0].update(kind="dora")), "header is damaged"),
    "bad-setting": (damage(lambda t, h: h["config"].update(lora_rank=0)), "lora_rank: got 0"),
    "missing": (damage(lambda t, h: t.__delitem__(NAME)), f"differ .*: {NAME}"),
    "extra": (damage(lambda t, h: t.update(spy=torch.ones(1))), "differ .*: spy"),
    "shape": (damage(lambda t, h: t.update({NAME: t[NAME][:3].clone()})), f"differ .*: {NAME}"),
    "integer": (damage(lambda t, h: t.update({NAME: t[NAME].int()})), f"{NAME} is torch.int32"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_error_and_changes_nothing(name, tmp_path):
    spoil, message = BAD_FILES[name]
    base, _ = saved(tmp_path)
    spoil(tmp_path)
    assert_refused(base, tmp_path, message)


def assert_refused(base, path, message, error=AdapterError):
    """Neither way of loading takes the file, and neither changes the model."""
    state, attributes = snapshot(base), set(vars(base))
    with pytest.raises(error, match=message) as caught:
        load_hybrid_adapter(base, path)
    assert "\n" not in str(caught.value)
    assert_same_state(base, state)
    assert set(vars(base)) == attributes
    assert all(parameter.requires_grad for parameter in base.parameters())
    heads = [name for name, _ in base.named_children() if name == "classifier"]
    targets = ["query"] if heads else ["q_proj", "v_proj", "up_proj"]
    model = adapted(base, target_modules=targets, apply_lora_to=targets[:1])
    state = snapshot(model)
    with pytest.raises(error):
        model.load_adapter_parameters(path)
    assert_same_state(model, state)


def test_no_file_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / FILE):
        assert_refused(llama(), path, "no hybrid adapter at", FileNotFoundError)


def test_another_class_or_size_of_base_is_refused(tmp_path):
    saved(tmp_path)
    classifier = llama(transformers.LlamaForSequenceClassification)
    assert_refused(classifier, tmp_path, "is a LlamaForSequenceClassification, the file's a Llama")
    assert_refused(llama(hidden_size=64), tmp_path, r"q_proj is 64x64, in the file 32x32")
    assert_refused(llama(num_hidden_layers=1), tmp_path, "the model has no model.layers.1")
    assert_refused(llama(num_hidden_layers=3), tmp_path, "the base has .* parameters, the file's")
    assert_refused(llama(vocab_size=65), tmp_path, "the base has .* parameters, the file's")
    assert_refused(bert(), tmp_path, "the model has no model.layers.0.self_attn.q_proj")


def test_another_head_is_refused(tmp_path):
    settings = dict(target_modules=["query"], apply_lora_to=["query"])
    saved(tmp_path, bert, **settings)
    assert_refused(bert(num_labels=5), tmp_path, "the base has .* parameters, the file's")
    tensors, header = parts(tmp_path)
    tensors["classifier.weight"] = tensors["classifier.weight"].T.contiguous()
    rewrite(tmp_path, tensors, header)
    torch.manual_seed(1)
    assert_refused(
        bert(), tmp_path, r"classifier.weight has shape \(3, 32\), in the file \(32, 3\)"
    )


def test_other_weights_or_another_name_give_one_warning_or_an_error_when_strict(tmp_path):
    base, model = saved(tmp_path)
    torch.manual_seed(2)
    other = llama()
    with pytest.raises(AdapterError, match="weights are not those"):
        load_hybrid_adapter(other, tmp_path, strict=True)
    with pytest.warns(UserWarning, match="weights are not those") as caught:
        load_hybrid_adapter(other, tmp_path)
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(UserWarning, match="weights are not those") as caught:
        other.load_adapter_parameters(tmp_path)
    assert len(caught) == 1 and caught[0].filename == __file__

    base.config._name_or_path = model.config._name_or_path = "someone/model"
    model.save_adapter_parameters(tmp_path)
    base.config._name_or_path = "another/model"
    with pytest.warns(UserWarning, match="called 'another/model', the file's 'someone/model'"):
        load_hybrid_adapter(base, tmp_path)


def test_one_changed_layer_changes_the_fingerprint(tmp_path):
    base, _ = saved(tmp_path)
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(AdapterError, match="weights are not those"):
        load_hybrid_adapter(base, tmp_path, strict=True)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", DTYPES)
@pytest.mark.parametrize("used", DTYPES)
def test_a_base_is_known_in_every_dtype_it_is_loaded_in(stored, trained, used, tmp_path):
    """And another is not taken for it: one that differs by 2 % in one layer."""
    torch.manual_seed(1)
    base = llama(num_hidden_layers=6).to(stored)
    with torch.no_grad():
        base.model.norm.weight.copy_(torch.logspace(-9, 3, 32))  # fp16 loses digits below 6e-5
    adapted(copy.deepcopy(base).to(trained)).save_adapter_parameters(tmp_path)
    load_hybrid_adapter(copy.deepcopy(base).to(used), tmp_path, strict=True)
    with torch.no_grad():
        base.model.layers[4].mlp.up_proj.weight.mul_(1.02)
    with pytest.raises(AdapterError, match="weights are not those"):
        load_hybrid_adapter(base.to(used), tmp_path, strict=True)


def test_half_a_step_makes_another_base_where_no_dtype_explains_it(tmp_path):
    base, _ = saved(tmp_path)
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight.mul_(1 + 2**-9)
    with pytest.raises(AdapterError, match="weights are not those"):
        load_hybrid_adapter(base, tmp_path, strict=True)


def test_a_file_of_an_older_version_knows_its_base_by_the_fingerprint_alone(tmp_path):
    base, _ = saved(tmp_path)
    tensors, header = parts(tmp_path)
    del header["base_samples"]
    rewrite(tmp_path, tensors, header)
    load_hybrid_adapter(copy.deepcopy(base), tmp_path, strict=True)
    with pytest.raises(AdapterError, match="weights are not those"):
        load_hybrid_adapter(base.half(), tmp_path, strict=True)


def test_damaged_samples_are_one_error(tmp_path):
    base, _ = saved(tmp_path)
    tensors, header = parts(tmp_path)
    rewrite(tmp_path, tensors, header | {"base_samples": "abc"})
    assert_refused(base, tmp_path, "header is damaged")


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(scaling_factor=0.25), "scaling_factor is 0.25, in the file 0.5"),
        (dict(adapter_scale=2.0), "adapter_scale is 2.0, in the file 1.0"),
        (dict(activation="relu"), "activation is 'relu', in the file 'gelu'"),
        (dict(shared_parameters=False), "shared_parameters is False, in the file True"),
        (dict(adapter_bias=False), "adapter_bias is False, in the file True"),
        (dict(lora_rank=5), r"q_proj has lora 5 on 32x32 \(q_proj\), in the file lora 4"),
        (dict(layers=[0]), "model.layers.1.self_attn.q_proj is adapted only in the file"),
        (dict(modules_to_save=["norm"]), "trained heads are model.norm, in the file"),
    ],
)
def test_an_adapter_of_other_settings_is_refused(settings, message, tmp_path):
    base, _ = saved(tmp_path)
    model = adapted(base, **settings)
    state = snapshot(model)
    with pytest.raises(AdapterError, match=message):
        model.load_adapter_parameters(tmp_path)
    assert_same_state(model, state)


def test_settings_that_do_not_change_the_meaning_may_differ(tmp_path):
    base, model = saved(tmp_path)
    other = adapted(base, adapter_dropout=0.4, init="gaussian", dropout_mask_sharing="module")
    other.load_adapter_parameters(tmp_path)
    assert_same_state(other, snapshot(model))


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    model = adapted(llama())
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(AdapterError, match="adapter: got a file, allowed: a directory"):
        model.save_adapter_parameters(tmp_path / "adapter")
    assert (tmp_path / "adapter").read_text() == "mine"
