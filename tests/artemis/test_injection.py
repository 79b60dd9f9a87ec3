"""Adding and removing: the base stays the base, and the model stays an ordinary torch model."""

import copy
import io
import pickle
from typing import NamedTuple

import pytest
import torch
import transformers
from torch import nn
from torch.export import Dim, export
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from artemis import HybridAdapterConfig, add_hybrid_adapter_to_model, quantize_adapter_model
from artemis.layers.bank import initial
from artemis.report import adapter_parts, count_parameters
from tests.artemis.models import (
    TOKENS,
    adapted,
    assert_same_state,
    bert,
    fill_bank,
    gpt2,
    gradients,
    llama,
    snapshot,
    t5,
    tokens,
)

BLOCKS = dict(target_modules=["q_proj", "mlp"])
GPT2 = dict(target_modules=["c_attn", "mlp.c_proj", "c_fc"], apply_lora_to=["c_attn"])
BERT = dict(target_modules=["query", "value", "output.dense"], apply_lora_to=["query", "value"])
T5 = dict(target_modules=["q", "k", "v", "wi", "wo"], apply_lora_to=["q", "k", "v"])


def mixtral() -> nn.Module:
    """Its experts and its router are plain parameters: no linear layer in the whole block."""
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        experts_implementation="eager", **TOKENS,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


MODELS = [
    pytest.param(llama, {}, id="llama"),
    pytest.param(llama, dict(shared_parameters=False, init="orthogonal"), id="llama-own-tensors"),
    pytest.param(llama, BLOCKS, id="llama-blocks"),
    pytest.param(gpt2, GPT2, id="gpt2-conv1d"),
    pytest.param(bert, BERT, id="bert"),
    pytest.param(t5, T5, id="t5"),
    pytest.param(mixtral, BLOCKS, id="mixtral-blocks"),
]


def outputs(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


@pytest.mark.parametrize("build, settings", MODELS)
def test_a_fresh_hybrid_equals_its_base_bit_for_bit_and_removal_gives_the_base_back(
    build, settings
):
    model, ids = build(), tokens()
    for parameter in list(model.parameters())[:2]:
        parameter.requires_grad_(False)  # what was frozen before must be frozen after
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state, expected, text = snapshot(model), outputs(model, ids), repr(model)
    attributes = set(vars(model))
    adapted(model, fill=False, **settings)
    assert torch.equal(outputs(model, ids), expected)
    assert {k: v for k, v in snapshot(model).items() if k in state}.keys() == state.keys()

    fill_bank(model)
    assert not torch.allclose(outputs(model, ids), expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(outputs(model, ids), expected)
    assert not torch.allclose(outputs(model, ids), expected, atol=1e-3)

    model.remove_adapter()
    assert torch.equal(outputs(model, ids), expected)
    assert_same_state(model, state)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert repr(model) == text and set(vars(model)) == attributes


@pytest.mark.parametrize("build, settings", MODELS)
def test_exactly_the_bank_and_the_heads_train(build, settings):
    model = adapted(build(), **settings)
    heads = tuple(f"{head}." for head in model.hybrid_adapter.heads)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith(("hybrid_adapter.", *heads)), name


def test_each_tensor_is_in_the_state_once_under_the_prefix():
    model = llama()
    base = set(model.state_dict())
    adapted(model)
    added = set(model.state_dict()) - base
    assert added and all(name.startswith("hybrid_adapter.") for name in added)
    assert {
        f"hybrid_adapter.{name}" for name, _ in model.hybrid_adapter.named_parameters()
    } == added
    assert len({t.data_ptr() for t in model.state_dict().values()}) == len(model.state_dict())


def test_disabled_in_the_configuration_leaves_the_model_untouched():
    model = llama()
    state, attributes = snapshot(model), set(vars(model))
    config = HybridAdapterConfig(enabled=False, target_modules=["nothing", "q_proj"])
    assert add_hybrid_adapter_to_model(model, config) is model
    assert_same_state(model, state)
    assert set(vars(model)) == attributes and all(p.requires_grad for p in model.parameters())


def test_save_pretrained_of_a_hybrid_gives_the_base_back(tmp_path):
    model = llama()
    state = snapshot(model)
    adapted(model).save_pretrained(tmp_path)
    assert_same_state(transformers.LlamaForCausalLM.from_pretrained(tmp_path), state)


def test_state_dict_carries_the_adapter_over():
    model, other, ids = adapted(llama()), adapted(llama()), tokens()
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other, ids), outputs(model, ids))


def clone_by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def clone_by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, clone_by_pickle, clone_by_torch_save])
@pytest.mark.parametrize("settings", [{}, BLOCKS], ids=["layers", "blocks"])
def test_a_copy_computes_the_same_and_is_independent(clone, settings, tmp_path):
    model, ids = adapted(llama(), **settings), tokens()
    expected = outputs(model, ids)
    other = clone(model)
    assert type(other) is transformers.LlamaForCausalLM
    assert torch.equal(outputs(other, ids), expected)

    fill_bank(other, 0.5)  # the copy's bank, not the original's
    changed = outputs(other, ids)
    assert torch.equal(outputs(model, ids), expected) and not torch.equal(changed, expected)
    with other.disable_adapter():
        assert torch.equal(outputs(model, ids), expected)
    other.save_adapter_parameters(tmp_path)  # the copy's method saves the copy
    other.remove_adapter()
    assert torch.equal(outputs(model, ids), expected)
    model.load_adapter_parameters(tmp_path)
    assert torch.equal(outputs(model, ids), changed)


@pytest.mark.parametrize("bits", [None, 8])
def test_an_exported_model_computes_the_same(bits):
    """For any number of tokens, read back from its file."""
    model = adapted(llama(num_hidden_layers=1))
    if bits:
        quantize_adapter_model(model, bits=bits, progress=False, adapter_bits=32)
    sizes = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}, "use_cache": None}
    arguments = {"input_ids": tokens(), "use_cache": False}
    torch.export.save(export(model, (), arguments, dynamic_shapes=sizes), file := io.BytesIO())
    file.seek(0)
    program = torch.export.load(file).module()
    ids = tokens(3, 17)
    logits = program(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grouping", [True, False])
def test_a_model_that_was_exported_in_training_is_copied_and_pickled(grouping):
    """Tracing draws dropout seeds that have no value."""
    model, ids = adapted(llama(), grouping=grouping, lora_dropout=0.2).train(), tokens()
    layer = model.model.layers[0].self_attn
    export(layer.q_proj, (torch.randn(2, 5, 32),))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(ids).logits.sum().backward()


def test_the_model_moves_to_another_dtype_as_a_whole():
    model, ids = adapted(llama()).to(torch.float64), tokens()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert outputs(model, ids).dtype == torch.float64


@pytest.mark.parametrize("dtype", ["float32", "model"])
def test_the_adapters_dtype_over_a_bf16_base(dtype):
    model = adapted(llama().to(torch.bfloat16), adapter_dtype=dtype)
    want = torch.float32 if dtype == "float32" else torch.bfloat16
    assert {p.dtype for p in model.hybrid_adapter.parameters()} == {want}
    assert outputs(model, tokens()).dtype == torch.bfloat16


@pytest.mark.parametrize("settings", [{}, BLOCKS], ids=["layers", "blocks"])
def test_the_adapters_dtype_where_a_hook_makes_the_weights(settings):
    """A pruned layer's `weight` stays in the dtype of the last forward until the next one."""
    model = llama()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            prune.l1_unstructured(module, "weight", 0.5)
    model.to(torch.bfloat16)
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32
    adapted(model, adapter_dtype="model", **settings)
    assert {p.dtype for p in model.hybrid_adapter.parameters()} == {torch.bfloat16}


def test_the_adapters_dtype_behind_a_block_of_plain_parameters():
    model = mixtral().to(torch.bfloat16)
    adapted(model, adapter_dtype="model", target_modules=["mlp"], apply_lora_to=[])
    assert {p.dtype for p in model.hybrid_adapter.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("build, settings", [MODELS[0], MODELS[2], MODELS[3]])
def test_generation_with_a_cache_equals_generation_without(build, settings):
    model, ids = adapted(build(), **settings), tokens(length=5)
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    with_cache = model.generate(ids, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))
    with model.disable_adapter():
        assert not torch.equal(with_cache, model.generate(ids, **options))


@pytest.mark.parametrize("build, settings", MODELS)
def test_layers_equal_the_definition_written_out(build, settings, monkeypatch):
    """Against plain torch in fp64: a hook on the untouched base adds each adapter's definition."""
    model = adapted(build(), **settings).double()
    ids = tokens()
    got = outputs(model, ids)
    bank = model.hybrid_adapter
    sites = {path: (site.spec, bank.tensors(site.layout)) for path, site in bank.sites.items()}
    model.remove_adapter()
    for path, (spec, t) in sites.items():
        model.get_submodule(path).register_forward_hook(definition(spec, t, bank.config))
    torch.testing.assert_close(got, outputs(model, ids), rtol=1e-9, atol=1e-9)


def definition(spec, t, config):
    def hook(module, args, y):
        gain = t.get("gain", 1.0)
        if spec.kind == "lora":
            return y + config.scaling_factor * gain * (args[0] @ t["lora_a"].T @ t["lora_b"].T)
        h = nn.functional.gelu(y @ t["down"].T + t["bias_down"])
        return y + config.adapter_scale * gain * (h @ t["up"].T + t["bias_up"])

    return hook


def test_a_block_that_returns_no_tensor_is_refused_at_the_call():
    model = adapted(llama(), target_modules=["q_proj", "model"], apply_lora_to=["q_proj"])
    with pytest.raises(TypeError, match="model returned a BaseModelOutputWithPast"):
        outputs(model, tokens())


def test_a_block_may_return_a_tuple():
    model, ids = llama(), tokens()
    expected = outputs(model, ids)
    adapted(model, fill=False, target_modules=["q_proj", "self_attn"], apply_lora_to=["q_proj"])
    assert torch.equal(outputs(model, ids), expected)
    fill_bank(model)
    assert not torch.allclose(outputs(model, ids), expected, atol=1e-3)


class Outputs(NamedTuple):
    states: torch.Tensor
    other: int


class Named(nn.Module):
    """A block that returns a named tuple, and a model that reads it by its names."""

    def __init__(self):
        super().__init__()
        self.config = transformers.PretrainedConfig(hidden_size=8)
        self.block = nn.Sequential(nn.Linear(8, 8))
        self.block.register_forward_hook(lambda module, args, y: Outputs(y, 3))

    def forward(self, x):
        outputs = self.block(x)
        assert outputs.other == 3
        return outputs.states


def test_a_block_may_return_a_named_tuple():
    model, x = Named().eval(), torch.randn(4, 8)
    expected = model(x)
    adapted(model, fill=False, target_modules=["block"], apply_lora_to=[])
    assert torch.equal(model(x), expected)
    fill_bank(model)
    assert not torch.allclose(model(x), expected, atol=1e-3)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


def test_initial_values():
    model = adapted(llama(hidden_size=256, num_hidden_layers=1), fill=False, adapter_size=16)
    bank = model.hybrid_adapter
    a, down = bank.lora_a["q_proj/256x256"], bank.down["down_proj/48x256"]
    assert a.abs().max() <= 1 / 16 and a.abs().max() > 0.95 / 16  # uniform within 1/sqrt(in)
    assert abs(a.std().item() - 1 / 16 / 3**0.5) < 0.003
    assert abs(down.std().item() - 0.02) < 0.001
    zeros = (bank.lora_b, bank.up, bank.bias_down, bank.bias_up)
    assert all(not tensor.any() for table in zeros for tensor in table.values())
    assert all(gain.item() == 1.0 for gain in bank.gain.values())


def test_initial_values_by_name():
    bank = adapted(llama(hidden_size=256), fill=False, init="gaussian").hybrid_adapter
    assert abs(bank.lora_a["q_proj/256x256"].std().item() - 1 / 4) < 0.02
    bank = adapted(llama(), fill=False, init="orthogonal").hybrid_adapter
    for rows in (*bank.lora_a.values(), *bank.down.values()):
        torch.testing.assert_close(rows @ rows.T, torch.eye(rows.shape[0]), rtol=0, atol=1e-5)


def test_a_seed_gives_the_same_adapter():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(adapted(llama(), fill=False))
    assert_same_state(models[0], snapshot(models[1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_seed_gives_the_same_adapter_whatever_torchs_defaults(dtype):
    base, models = llama(), []
    for default in (torch.float32, dtype):
        torch.manual_seed(3)
        torch.set_default_dtype(default)
        try:
            models.append(adapted(copy.deepcopy(base), fill=False))
        finally:
            torch.set_default_dtype(torch.float32)
    assert_same_state(models[0], snapshot(models[1]))
    with torch.device("meta"):
        assert initial("lora_a", (4, 6), "default").device.type == "cpu"


def test_an_unfrozen_base_still_trains_right():
    """A user may unfreeze layers: the adapters must not swallow the weight's gradient."""
    model, ids = adapted(llama()), tokens()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(ids, labels=ids).loss.backward()
    assert gradients(model).keys() == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("bits", [None, 32, 8])
def test_the_parameter_count_is_that_of_the_numbers(bits):
    """Packed or not, the same numbers count; only what trains differs."""
    model = adapted(llama())
    adapter = sum(p.numel() for p in model.hybrid_adapter.parameters())
    total = sum(p.numel() for p in model.parameters())
    if bits is not None:
        quantize_adapter_model(model, adapter_bits=bits, progress=False)
    counts, parts = count_parameters(model), adapter_parts(model)
    assert counts["total_parameters"] == total
    assert parts["lora"] + parts["bottleneck"] + parts["gains"] == adapter
    assert counts["trainable_parameters"] == (0 if bits == 8 else adapter)


def test_the_parameter_count_is_printed(capsys):
    model = adapted(llama())
    model.print_trainable_parameters()
    trainable = sum(p.numel() for p in model.hybrid_adapter.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert (
        f"{trainable:,} of {total:,} ({100 * trainable / total:.4f} %)" in capsys.readouterr().out
    )


class Products(TorchDispatchMode):
    """Records the sizes of what batched products multiply by."""

    def __init__(self):
        super().__init__()
        self.batched = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.bmm.default:
            self.batched.append(tuple(args[1].shape))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [1, 2])
def test_the_last_tokens_logits_copy_no_head(batch):
    model = adapted(llama()).eval()
    with torch.no_grad(), Products() as seen:
        model(tokens()[:batch], logits_to_keep=1)
    assert not any(model.config.vocab_size in sizes for sizes in seen.batched)
    head, x = model.get_output_embeddings(), torch.randn(2, 32)
    assert torch.equal(head(input=x), head(x))
    copied = copy.deepcopy(model)
    copied.remove_adapter()
    assert not copied.get_output_embeddings()._forward_pre_hooks and head._forward_pre_hooks
    model.remove_adapter()
    assert not head._forward_pre_hooks
