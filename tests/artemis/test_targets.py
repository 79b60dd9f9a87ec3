"""Which modules a configuration means, and the errors where it means none."""

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize
from torch.testing._internal.two_tensor import TwoTensor

from artemis import (
    AdapterError,
    HybridAdapterConfig,
    add_hybrid_adapter_to_model,
    load_hybrid_adapter,
    quantize_adapter_model,
)
from tests.artemis.models import (
    SMALL,
    TOKENS,
    adapted,
    assert_same_state,
    bert,
    gpt2,
    llama,
    snapshot,
    t5,
    tokens,
)


def kinds(model) -> dict[str, str]:
    return {path: site.spec.kind for path, site in model.hybrid_adapter.sites.items()}


def test_the_default_puts_lora_on_attention_and_bottlenecks_on_feed_forward():
    expected = {
        f"model.layers.{layer}.{block}.{name}_proj": kind
        for layer in range(2)
        for block, names, kind in (
            ("self_attn", "qkvo", "lora"),
            ("mlp", ("gate", "up", "down"), "bottleneck"),
        )
        for name in names
    }
    assert kinds(adapted(llama())) == expected


def test_an_entry_is_a_whole_path_or_its_last_parts():
    model = adapted(
        llama(),
        target_modules=["model.layers.1.self_attn.q_proj", "mlp.up_proj"],
        apply_lora_to=["model.layers.1.self_attn.q_proj"],
    )
    assert kinds(model) == {
        "model.layers.0.mlp.up_proj": "bottleneck",
        "model.layers.1.self_attn.q_proj": "lora",
        "model.layers.1.mlp.up_proj": "bottleneck",
    }


def test_an_entry_is_not_the_end_of_a_name():
    with pytest.raises(AdapterError, match="'proj' matches no module"):
        adapted(llama(), target_modules=["q_proj", "proj"])


def test_a_string_is_a_regular_expression_for_the_whole_path():
    model = adapted(
        llama(), target_modules=r".*\.0\..*\.(q|up)_proj", apply_lora_to=r".*self_attn.*"
    )
    assert kinds(model) == {
        "model.layers.0.self_attn.q_proj": "lora",
        "model.layers.0.mlp.up_proj": "bottleneck",
    }


def test_a_regular_expression_takes_the_default_lora_names_where_none_are_given():
    model = adapted(llama(), target_modules=r".*\.(q|up)_proj")
    assert set(kinds(model).values()) == {"lora", "bottleneck"}


def test_exclusion_wins_and_layers_restrict():
    model = adapted(llama(num_hidden_layers=3), exclude_modules=["mlp.up_proj"], layers=[0, 2])
    paths = kinds(model)
    assert not any("up_proj" in path or ".1." in path for path in paths)
    assert len(paths) == 12


def test_layers_count_by_the_first_number_of_a_path():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleDict({"experts": nn.ModuleList(nn.ModuleDict({"w": nn.Linear(4, 4)})
                                                        for _ in range(2))})
                for _ in range(2)
            )  # fmt: skip

    model = adapted(Expert(), target_modules=["w"], apply_lora_to=["w"], layers=[1])
    assert list(kinds(model)) == ["layers.1.experts.0.w", "layers.1.experts.1.w"]


def test_gpt2_and_bert_and_t5_by_their_own_names():
    model = adapted(gpt2(), target_modules=["c_attn", "c_fc"], apply_lora_to=["c_attn"])
    assert kinds(model)["transformer.h.1.attn.c_attn"] == "lora"
    assert kinds(model)["transformer.h.0.mlp.c_fc"] == "bottleneck"
    model = adapted(bert(), target_modules=["query", "output.dense"], apply_lora_to=["query"])
    assert kinds(model)["bert.encoder.layer.0.attention.output.dense"] == "bottleneck"
    model = adapted(t5(), target_modules=["q", "wi"], apply_lora_to=["q"])
    assert kinds(model)["decoder.block.1.layer.1.EncDecAttention.q"] == "lora"


def test_a_block_gets_a_bottleneck_of_the_hidden_size():
    model = adapted(llama(), target_modules=["q_proj", "mlp"])
    spec = model.hybrid_adapter.sites["model.layers.0.mlp"].spec
    assert (spec.kind, spec.in_features, spec.out_features) == ("block", 32, 32)


def clip():
    """Two towers of different widths, each with a configuration of its own."""
    text = dict(SMALL, vocab_size=99, max_position_embeddings=32, eos_token_id=2)
    vision = dict(SMALL, hidden_size=48, image_size=16, patch_size=8)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    return transformers.CLIPModel(config).eval()


def test_a_block_of_a_tower_gets_the_towers_width(tmp_path):
    base, settings = clip(), dict(target_modules=["q_proj", "mlp"], apply_lora_to=["q_proj"])
    model = adapted(copy.deepcopy(base), **settings)
    widths = {p: s.spec.in_features for p, s in model.hybrid_adapter.sites.items() if "mlp" in p}
    assert widths == {
        "text_model.encoder.layers.0.mlp": 32,
        "vision_model.encoder.layers.0.mlp": 48,
    }
    inputs = dict(input_ids=tokens(length=8), pixel_values=torch.randn(2, 3, 16, 16))
    model.save_adapter_parameters(tmp_path)
    again = load_hybrid_adapter(base, tmp_path)
    assert torch.equal(again(**inputs).logits_per_text, model(**inputs).logits_per_text)


def test_a_block_of_another_width_is_refused_by_its_path():
    """As in Swin, which states the width of its last stage alone."""
    stage = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))})
    model = nn.ModuleDict({"layers": nn.ModuleList([stage])})
    model.config = transformers.PretrainedConfig(hidden_size=16)
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp .*turn 8 features into 8, .* is 16;"):
        adapted(model, target_modules=["mlp"], apply_lora_to=[])
    assert_same_state(model, before)


def test_a_block_that_returns_another_width_is_named():
    model = adapted(bert(), target_modules=["intermediate"], apply_lora_to=[])
    with pytest.raises(AdapterError, match=r"layer\.0\.intermediate returned 48 .* is for 32"):
        model(tokens())


def mixtral():
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, **TOKENS,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def test_default_names_that_a_model_lacks_only_warn():
    model = mixtral()
    with pytest.warns(UserWarning, match="'(gate|up|down)_proj' matches no module") as warned:
        adapted(model)
    assert set(kinds(model).values()) == {"lora"}
    # Names like it are those of targets already, and of the router, which is no target.
    assert not any("did you mean" in str(w.message) for w in warned)


def test_experts_that_are_one_parameter_are_refused_with_the_way_out():
    with pytest.raises(AdapterError, match=r"mlp.experts is a Mix.*: name the block around it"):
        adapted(mixtral(), target_modules=["experts"], apply_lora_to=[])


def test_layers_of_another_kind_that_the_default_leaves_out_are_named():
    config = transformers.BambaConfig(
        **SMALL | TOKENS | dict(num_hidden_layers=2), num_key_value_heads=2, attn_layer_indices=[1],
        mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"layers 0 of model.layers get no LoRA.* \(in_proj\);"):
        adapted(transformers.BambaForCausalLM(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(llama())
        adapted(llama(), layers=[1])


BAD_TARGETS = [
    (dict(target_modules=["q_proj", "u_proj"]), r"'u_proj' matches no module; did .*'up_proj'"),
    (dict(target_modules=["q_proj", "mlp.q_proj"]), r"'mlp.q_proj' matches no module"),
    (dict(target_modules="q_proj"), r"'q_proj', a regular expression .* no module of Llama"),
    (dict(exclude_modules=["mpl"]), r"exclude_modules: 'mpl' matches no .* you mean 'mlp'"),
    (dict(layers=[1, 2, 7]), r"layers: got 2, 7, allowed: .*\(0, 1\)"),
    (dict(exclude_modules=["q_proj"], target_modules=["q_proj"]), r"all 2 .* are left out"),
    (dict(modules_to_save=["lm_heat"]), r"modules_to_save: 'lm_heat' .* did you mean 'lm_head'"),
    (dict(modules_to_save=["act_fn"]), r"modules_to_save: .*act_fn has no parameters"),
    (dict(target_modules=["q_proj", "act_fn"]), r"mlp.act_fn is a SiLUActivation; allowed"),
    (dict(target_modules=["q_proj", "embed_tokens"]), r"embed_tokens is a Embedding; allowed"),
    (dict(target_modules=["q_proj", "layers"]), r"model.layers is a ModuleList; allowed"),
    (dict(target_modules=["q_proj", "mlp"], apply_lora_to=["q_proj", "mlp"]), r"mlp is a LlamaMLP"),
    (dict(target_modules=r".*(q|v)_proj", apply_lora_to=["up_proj"]), r"apply_lora_to: 'up_proj'"),
]  # fmt: skip


@pytest.mark.parametrize("settings, message", BAD_TARGETS)
def test_a_bad_target_is_named_and_nothing_changes(settings, message):
    model = llama()
    before, attributes = snapshot(model), set(vars(model))
    with pytest.raises(AdapterError, match=message):
        adapted(model, **settings)
    assert_same_state(model, before)
    assert set(vars(model)) == attributes
    assert {type(m).__name__ for m in model.modules() if "Adapted" in type(m).__name__} == set()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_where_nothing_matches_the_models_own_names_are_listed():
    with pytest.raises(
        AdapterError, match=r"no module of GPT2.*called c_attn, c_proj, c_fc, lm_head"
    ):
        adapted(gpt2())


def test_a_subclass_of_linear_is_not_taken_for_a_linear_layer():
    class Quantized(nn.Linear):
        pass

    model = nn.ModuleDict({"q_proj": Quantized(4, 4)})
    with pytest.raises(AdapterError, match="q_proj is a Quantized"):
        adapted(model, target_modules=["q_proj"])


def test_a_parametrized_layer_is_no_block():
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "convolution": nn.Conv1d(4, 4, 1)})
    model.config = transformers.PretrainedConfig(hidden_size=4)
    for name, module in model.items():
        parametrize.register_parametrization(module, "weight", nn.Linear(1, 1), unsafe=True)
        with pytest.raises(AdapterError, match=f"{name} is a Parametrized"):
            adapted(model, target_modules=[name], apply_lora_to=[])


def test_a_weight_that_stands_for_other_tensors_is_refused():
    """As torchao's are: `nn.Linear` over a subclass of tensors."""
    model = llama()
    layer = model.model.layers[1].self_attn.q_proj
    layer.weight = nn.Parameter(TwoTensor(layer.weight.detach(), layer.weight.detach()))
    attributes = set(vars(model))
    with pytest.raises(AdapterError, match=r"layers.1.self_attn.q_proj is a TwoTensor"):
        adapted(model)
    assert set(vars(model)) == attributes
    blocks = adapted(model, target_modules=["mlp", "self_attn"], apply_lora_to=[])
    assert set(kinds(blocks).values()) == {"block"}  # they only add to what the layers return


@pytest.mark.parametrize(
    "wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel]
)
def test_a_wrapped_model_is_refused(wrap, tmp_path):
    model = adapted(llama())
    model.save_adapter_parameters(tmp_path)
    model.remove_adapter()
    wrapped = wrap(model)
    attributes = set(vars(wrapped))
    for add in (adapted, lambda model: load_hybrid_adapter(model, tmp_path)):
        with pytest.raises(AdapterError, match="that is not wrapped yet; compile"):
            add(wrapped)
    assert set(vars(wrapped)) == attributes and all(p.requires_grad for p in model.parameters())


def wavlm():
    """Its attention hands its projections' weights to torch."""
    config = transformers.WavLMConfig(
        **SMALL, conv_dim=(8,), conv_stride=(5,), conv_kernel=(10,), num_feat_extract_layers=1,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return transformers.WavLMModel(config).eval()


def mamba():
    config = transformers.MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=1, **TOKENS)
    return transformers.MambaForCausalLM(config).eval()


def torch_encoder():
    """At inference torch runs a whole layer as one operation, over its weights."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()


def layoutlm():
    """Its encoder takes rows of the layers that weigh relative positions."""
    config = transformers.LayoutLMv3Config(
        **SMALL, vocab_size=64, coordinate_size=4, shape_size=8, visual_embed=False,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.LayoutLMv3Model(config).eval()


def rwkv():
    """The model rescales two weights of a layer when it goes from training to inference."""
    config = transformers.RwkvConfig(
        hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, rescale_every=1, **TOKENS
    )
    return transformers.RwkvForCausalLM(config).eval()


READ = [
    (wavlm, ["q_proj", "k_proj", "v_proj", "out_proj"], "intermediate_dense", "WavLMAttention"),
    (mamba, ["x_proj", "dt_proj", "out_proj"], "in_proj", "MambaMixer"),
    (torch_encoder, ["linear1", "linear2"], None, "TransformerEncoderLayer"),
    (layoutlm, ["rel_pos_bias", "rel_pos_x_bias"], "query", "LayoutLMv3Encoder"),
    (rwkv, ["attention.output"], "key", "RwkvSelfAttention"),
    (rwkv, ["feed_forward.value"], "receptance", "RwkvFeedForward"),
]


@pytest.mark.parametrize(("build", "names", "other", "reader"), READ)
def test_a_layer_whose_weight_is_read_past_it_is_refused(build, names, other, reader):
    model = build()
    before = snapshot(model)
    for name in names:
        with pytest.raises(AdapterError, match=rf"{name}, whose weights are .* in {reader} past"):
            adapted(model, target_modules=[name], apply_lora_to=[name])
    assert_same_state(model, before)
    assert {type(m).__name__ for m in model.modules() if "Adapted" in type(m).__name__} == set()
    if other:
        adapted(model, target_modules=[*names, other], apply_lora_to=[], exclude_modules=names)
        assert all(path.endswith(other) for path in kinds(model))


@pytest.mark.parametrize(("build", "names", "other", "reader"), READ[:2])
def test_a_layer_whose_weight_is_read_past_it_is_not_packed(build, names, other, reader):
    model = quantize_adapter_model(build(), progress=False)
    skipped = model.quantization_report.skipped
    read = {p.rpartition(".")[2] for p, r in skipped.items() if r.startswith(f"in {reader} its")}
    assert read == set(names)
    assert any(layer.path.endswith(other) for layer in model.quantization_report.layers)
    x = torch.randn(1, 400) if build is wavlm else tokens()
    assert torch.isfinite(model(x)[0]).all()


@pytest.mark.parametrize("build", [layoutlm, rwkv])
def test_a_model_that_uses_weights_past_their_layers_runs_packed(build):
    base, ids = build(), tokens()
    inputs = dict(input_ids=ids) | (
        dict(bbox=torch.zeros(2, 9, 4).long()) if build is layoutlm else {}
    )
    model = quantize_adapter_model(copy.deepcopy(base), activation_bits=16, progress=False)
    for training in (False, True, False):
        got, wanted = (m.train(training)(**inputs)[0] for m in (model, base))
        assert (got - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("exact", [False, True])
def test_layers_that_only_one_configuration_reads_are_targets_in_the_others(exact):
    config = transformers.BloomConfig(
        hidden_size=32, n_layer=1, n_head=4, pretraining_tp=2, slow_but_exact=exact, vocab_size=64
    )
    model, names = transformers.BloomModel(config).eval(), ["dense", "dense_4h_to_h"]
    if exact:
        with pytest.raises(AdapterError, match=r"in BloomAttention, BloomMLP past the layers"):
            adapted(model, target_modules=names, apply_lora_to=["dense"])
        return
    base = model(tokens())[0]
    adapted(model, target_modules=names, apply_lora_to=["dense"])
    assert not torch.allclose(model(tokens())[0], base, atol=1e-3)


def test_a_model_with_an_adapter_is_refused():
    model = adapted(llama())
    before = snapshot(model)
    with pytest.raises(AdapterError, match="has a hybrid adapter already"):
        adapted(model)
    assert_same_state(model, before)


def test_a_forward_of_its_own_is_refused():
    model = llama()
    layer = model.model.layers[0].self_attn.q_proj
    layer.forward = layer.forward  # as accelerate's hooks do
    with pytest.raises(AdapterError, match="carries a forward of its own"):
        adapted(model)


@pytest.mark.parametrize("model, config", [(object(), HybridAdapterConfig()), (None, {})])
def test_wrong_arguments_are_named(model, config):
    with pytest.raises(AdapterError, match="allowed: a"):
        add_hybrid_adapter_to_model(llama() if model is None else model, config)
