"""Saving a quantized base and loading it back: bit for bit, or refused and nothing changed."""

import copy
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from artemis import (
    AdapterError,
    HybridAdapterConfig,
    load_hybrid_adapter,
    load_quantized,
    quantize_adapter_model,
    save_quantized,
)
from artemis.layers.packed_linear import packed_layers
from artemis.quantization import load
from tests.artemis.models import adapted, assert_same_state, bert, gpt2, llama, snapshot, t5, tokens
from tests.artemis.quantization.files import FILE, rewritten
from tests.artemis.quantization.kit import FORMATS, interrupted_at, quantized


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("build", [llama, gpt2, bert, t5])
def test_round_trip(build, format, tmp_path):
    model, ids = quantized(build(), format), tokens()
    batch = dict(input_ids=ids, **(dict(decoder_input_ids=ids) if build is t5 else {}))
    expected, state = model(**batch).logits, snapshot(model)
    save_quantized(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    for target in (model.config, build(), build().bfloat16()):
        loaded = load_quantized(target, tmp_path)
        assert loaded is target or target is model.config
        assert_same_state(loaded, state)
        assert torch.equal(loaded(**batch).logits, expected)
        assert loaded.quantization_report == model.quantization_report
        assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
        activation_bits = {m.weight.activation_bits for _, m in packed_layers(loaded)}
        assert activation_bits == {model.quantization_report.activation_bits}
        assert not loaded.training
        head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
        tied = build in (gpt2, t5)
        assert head is None or (head.weight is embedding.weight) == tied


@pytest.mark.parametrize("build", [llama, gpt2])
def test_what_its_user_froze_stays_frozen(build, tmp_path):
    save_quantized(quantized(build()), tmp_path)
    model = build().requires_grad_(False)
    name = {llama: "model.norm.weight", gpt2: "transformer.ln_f.weight"}[build]
    model.get_parameter(name).requires_grad_()
    load_quantized(model, tmp_path)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [name]


def test_base_and_adapter_are_saved_apart(tmp_path):
    model, ids = quantized(adapted(llama()), "int4"), tokens()
    expected = model(ids).logits
    save_quantized(model, tmp_path / "base")
    model.save_adapter_parameters(tmp_path / "adapter")
    assert not any("adapter" in name for name in load_file(tmp_path / "base" / FILE))
    base = load_quantized(model.config, tmp_path / "base")
    assert not torch.equal(base(ids).logits, expected)
    loaded = load_hybrid_adapter(base, tmp_path / "adapter", strict=True)
    assert torch.equal(loaded(ids).logits, expected)


@pytest.mark.parametrize("build", [gpt2, t5, lambda: llama(tie_word_embeddings=True)])
def test_a_tied_head_of_its_own_is_no_other_base(build, tmp_path):
    """Plain, packed and loaded forms take one another's adapters, strictly."""
    plain = build()
    packed = quantize_adapter_model(copy.deepcopy(plain), include_head=True, progress=False)
    assert "lm_head" in dict(packed_layers(packed))
    save_quantized(packed, tmp_path / "base")
    names = {"gpt2": ["c_attn", "c_fc"], "t5": ["q", "wi"]}.get(plain.config.model_type)
    settings = dict(target_modules=names, apply_lora_to=names[:1]) if names else {}
    for form in (plain, packed):
        path = tmp_path / type(form.get_output_embeddings()).__name__
        adapted(copy.deepcopy(form), **settings).save_adapter_parameters(path)
        for target in (plain, packed, load_quantized(plain.config, tmp_path / "base")):
            load_hybrid_adapter(copy.deepcopy(target), path, strict=True)


class Twice(nn.Module):
    """One layer under two names, `b` being `a`, or a layer of its own, or missing."""

    def __init__(self, b="a", bias=True):
        super().__init__()
        self.a = nn.Linear(64, 64, bias=bias)
        if b:
            self.b = self.a if b == "a" else nn.Linear(64, 64, bias=bias)
        self.c = nn.Linear(64, 64)

    def forward(self, x):
        return self.c(getattr(self, "b", self.a)(self.a(x)))


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_with_two_names(bias, tmp_path):
    model, x = quantized(Twice(bias=bias)), torch.randn(3, 64)
    save_quantized(model, tmp_path / "twice")
    loaded = load_quantized(Twice(bias=bias), tmp_path / "twice")
    assert loaded.b is loaded.a
    assert_same_state(loaded, snapshot(model))
    assert torch.equal(loaded(x), model(x))
    save_quantized(quantized(Twice(b="own", bias=bias)), tmp_path / "own")
    save_quantized(quantized(Twice(b=None, bias=bias)), tmp_path / "none")
    for b, name, words in (
        ("own", "twice", "b is none of a packed layer, in the file another name of a"),
        (None, "twice", "b is none of a packed layer, in the file another name of a"),
        ("a", "own", "b is NoneType, in the file a linear layer of 64x64"),
        ("a", "none", "b is another name of a, in the file none of a packed layer"),
    ):
        other = Twice(b=b, bias=bias)
        state = snapshot(other)
        with pytest.raises(AdapterError, match=words):
            load_quantized(other, tmp_path / name)
        assert_same_state(other, state)


def test_a_file_without_the_list_of_untied_layers_loads(tmp_path):
    model = quantized(llama())
    save_quantized(model, tmp_path)
    rewritten(tmp_path, lambda h, t: h.pop("untied"))
    assert_same_state(load_quantized(llama(), tmp_path), snapshot(model))


def test_how_it_generates_comes_back_with_a_configuration(tmp_path):
    model = quantized(llama())
    model.generation_config.eos_token_id = [2, 5, 7]
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.6
    save_quantized(model, tmp_path)
    found = load_quantized(model.config, tmp_path).generation_config
    assert found.to_dict() == model.generation_config.to_dict()
    given = llama()  # a model that is given has its own
    own = given.generation_config
    assert load_quantized(given, tmp_path).generation_config is own
    rewritten(tmp_path, lambda h, t: h.pop("generation_config"))
    assert load_quantized(model.config, tmp_path).generation_config.eos_token_id == 2


def test_loading_a_configuration_never_makes_the_full_weights(tmp_path, monkeypatch):
    model = quantized(llama())
    save_quantized(model, tmp_path)
    made = []
    init = nn.Linear.__init__

    def recording(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(self.weight.device.type)

    monkeypatch.setattr(nn.Linear, "__init__", recording)
    loaded = load_quantized(model.config, tmp_path)
    assert set(made) == {"meta"}
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))


def test_a_save_cut_short_leaves_the_old_file(tmp_path, monkeypatch):
    old = quantized(llama())
    save_quantized(old, tmp_path)

    def dying(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            save_quantized(quantized(llama()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert_same_state(load_quantized(llama(), tmp_path), snapshot(old))


def test_what_does_not_fit_changes_nothing(tmp_path):
    save_quantized(quantized(llama()), tmp_path)
    for model, words in (
        (llama(intermediate_size=64), r"mlp\.gate_proj is 64x32, in the file a linear .* 48x32"),
        (llama(num_hidden_layers=1), r"layers\.1\.self_attn\.q_proj is NoneType"),
        (llama(num_hidden_layers=3), r"layers\.2\.\S+ is \(32,\), in the file missing"),
        (gpt2(), "the model is a GPT2LMHeadModel, the file's a LlamaForCausalLM"),
        (quantized(llama()), "adapted or quantized already"),
        (adapted(llama()), "adapted or quantized already"),
    ):
        state = snapshot(model)
        with pytest.raises(AdapterError, match=words):
            load_quantized(model, tmp_path)
        assert_same_state(model, state)


def test_neither_a_model_nor_its_configuration(tmp_path):
    save_quantized(quantized(llama()), tmp_path)
    for given in (HybridAdapterConfig(), llama().config.to_dict(), str(tmp_path)):
        with pytest.raises(AdapterError, match=f"got {type(given).__name__}, allowed: a model"):
            load_quantized(given, tmp_path)


def test_damaged_and_foreign_files(tmp_path):
    model, path = quantized(llama()), "model.layers.1.mlp.up_proj"
    save_quantized(model, tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    damages = (
        (lambda h, t: h.update(format_version=9), "got format version 9, allowed: 1"),
        (lambda h, t: h.pop("report"), "its header is damaged"),
        (lambda h, t: t.pop(f"{path}.weight_scale"), rf"damaged, it lacks {path}\.weight_scale"),
        (
            lambda h, t: t.update({f"{path}.weight_scale": torch.ones(3)}),
            rf"{path} is damaged \(QuantizedWeight: scale must be",
        ),
        (lambda h, t: t.pop("model.norm.weight"), r"model\.norm\.weight is \(32,\), in the file"),
        (lambda h, t: h.update(class_name="Nothing"), "the file's a Nothing"),
    )
    for change, words in damages:
        (tmp_path / FILE).write_bytes(whole)
        rewritten(tmp_path, change)
        plain = llama()
        state = snapshot(plain)
        with pytest.raises(AdapterError, match=words):
            load_quantized(plain, tmp_path)
        assert_same_state(plain, state)
    with pytest.raises(AdapterError, match="transformers has no class Nothing"):
        load_quantized(model.config, tmp_path)
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterError, match="damaged, or no safetensors file"):
        load_quantized(llama(), tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / FILE)
    with pytest.raises(AdapterError, match="not a quantized base's"):
        load_quantized(llama(), tmp_path)
    with pytest.raises(FileNotFoundError, match="no quantized base at"):
        load_quantized(llama(), tmp_path / "nowhere")


def test_fp8_numbers_are_bytes(tmp_path):
    save_quantized(quantized(llama(), "fp8"), tmp_path)
    name = "model.layers.1.mlp.up_proj.weight_data"
    rewritten(tmp_path, lambda h, t: t.update({name: t[name].to(torch.int16)}))
    plain = llama()
    state = snapshot(plain)
    with pytest.raises(AdapterError, match=r"up_proj is damaged: its numbers are torch\.int16"):
        load_quantized(plain, tmp_path)
    assert_same_state(plain, state)


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [(load, "pack", 3), (nn.Module, "register_buffer", 5), (nn.Module, "get_submodule", 2)],
)
def test_an_interrupted_load_leaves_the_model_as_it_was(owner, name, number, tmp_path, monkeypatch):
    model, ids = quantized(llama(), "int4"), tokens()
    save_quantized(model, tmp_path)
    plain = llama()
    state, expected = snapshot(plain), plain(ids).logits
    places = [(type(m), dict(vars(m))) for m in plain.modules()]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted_at(number, getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            load_quantized(plain, tmp_path)
    assert [(type(m), vars(m).keys()) for m in plain.modules()] == [
        (cls, attributes.keys()) for cls, attributes in places
    ]
    assert_same_state(plain, state)
    assert torch.equal(plain(ids).logits, expected)
    assert torch.equal(load_quantized(plain, tmp_path)(ids).logits, model(ids).logits)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(AdapterError, match="is not quantized"):
        save_quantized(llama(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="got a file, allowed: a directory"):
        save_quantized(quantized(llama()), tmp_path / "file")


@pytest.mark.parametrize(
    "wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel]
)
def test_of_a_wrapper_the_model_within_is_saved(wrap, tmp_path):
    model = quantized(llama())
    save_quantized(model, tmp_path / "a")
    save_quantized(wrap(model), tmp_path / "b")
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    with pytest.raises(AdapterError, match="that is not wrapped yet"):
        load_quantized(wrap(llama()), tmp_path / "b")


def test_layers_that_moved_are_refused_before_anything_is_written(tmp_path):
    """As where single blocks are compiled: no model has layers of such names."""
    model = quantized(llama())
    save_quantized(model, tmp_path)
    old, block = (tmp_path / FILE).read_bytes(), model.model.layers[1]
    for other in (torch.compile(block, backend="eager"), llama().model.layers[1]):
        model.model.layers[1] = other
        with pytest.raises(AdapterError, match=r"layers\.1\..*: wrapped, moved or"):
            save_quantized(model, tmp_path)
    assert (tmp_path / FILE).read_bytes() == old
    model.model.layers[1] = block
    save_quantized(model, tmp_path)
    assert (tmp_path / FILE).read_bytes() == old


def test_a_merged_adapter_is_not_saved_as_the_base(tmp_path):
    names = ["q_proj", "lm_head"]
    model = quantized(adapted(llama(), target_modules=names, apply_lora_to=names))
    assert model.merge_adapter().merged == ("lm_head",)
    with pytest.raises(AdapterError, match="call unmerge_adapter"):
        save_quantized(model, tmp_path / "base")
    assert not (tmp_path / "base").exists()
    model.unmerge_adapter()
    save_quantized(model, tmp_path / "base")


def test_a_copy_saves_the_same(tmp_path):
    model = quantized(llama(), "int4")
    save_quantized(model, tmp_path / "a")
    save_quantized(copy.deepcopy(model), tmp_path / "b")
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
