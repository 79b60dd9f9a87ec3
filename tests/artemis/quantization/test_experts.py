"""Models of experts in few bits: packed, reported, saved, trained, generating; or left, and why.

What the packed experts compute is tested in test_quantized_experts.py.
"""

import copy
import math
import pickle
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from artemis import (
    AdapterError,
    QuantizationReport,
    load_hybrid_adapter,
    load_quantized,
    quantize_adapter_model,
    save_quantized,
)
from artemis.experts import is_experts
from artemis.layers.packed import packed_modules, packed_numbers
from artemis.layers.packed_experts import QuantizedExperts
from artemis.quantization.calibrate import column_importance, matrix_of
from tests.artemis import moe
from tests.artemis.models import (
    SMALL,
    TOKENS,
    adapted,
    assert_same_state,
    enable_checkpointing,
    gradients,
    snapshot,
    tokens,
)
from tests.artemis.quantization.files import FILE, rewritten
from tests.artemis.quantization.kit import FORMATS, interrupted_at, quantized, relative

EXPERTS = "model.layers.0.mlp.experts"
ATTENTION = dict(target_modules=["q_proj", "v_proj"], apply_lora_to=["q_proj", "v_proj"])


def experts_in(model: nn.Module) -> dict[str, nn.Module]:
    return {path: m for path, m in packed_modules(model) if isinstance(m, QuantizedExperts)}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", moe.MODELS)
def test_models_compute_as_over_the_dequantized_weights(name, format):
    """Their routers train here: what they learn comes through the packed experts."""
    torch.manual_seed(0)
    plain, ids = moe.MODELS[name](), tokens()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = quantized(copy.deepcopy(plain), format)
    assert len(experts_in(model)) == 1
    assert list(model.quantization_report.skipped) == ["lm_head"]
    truth = moe.fp64(model, plain)
    router = next(n for n, p in model.named_parameters() if ".mlp." in n and p.dim() == 2)
    for one in (model, truth):
        one(input_ids=ids, labels=ids).loss.backward()
    assert relative(model(ids).logits, truth(ids).logits) < 1e-5
    for parameter in (router, "model.embed_tokens.weight"):
        got, wanted = (m.get_parameter(parameter).grad for m in (model, truth))
        assert wanted.abs().max() > 1e-6 and relative(got, wanted) < 1e-4, parameter


@pytest.mark.parametrize(("format", "limit"), [("int8", 0.51), ("fp8", 0.51), ("int4", 0.29)])
def test_bytes_of_the_experts(format, limit):
    model = moe.mixtral(hidden_size=256, intermediate_size=512).bfloat16()
    stacks = model.get_submodule(EXPERTS)
    before = {name: p.nbytes for name, p in stacks.named_parameters()}
    numbers = sum(p.numel() for p in model.parameters())
    report = quantized(model, format).quantization_report
    for name, was in before.items():
        entry = next(e for e in report.layers if e.path == f"{EXPERTS}.{name}")
        parts = [t.nbytes for n, t in stacks.named_buffers() if n.startswith(name)]
        assert (entry.bytes_before, entry.bytes_after) == (was, sum(parts) - 2 * 16)
        assert entry.bytes_after <= limit * was
    assert report.of_16_bits <= limit and not dict(stacks.named_parameters())
    assert sum(p.numel() for p in model.parameters()) + packed_numbers(model) == numbers


def test_the_report_tells_the_truth():
    plain = moe.gpt_oss()
    model = quantized(copy.deepcopy(plain), "int4", group_size=8)
    report = model.quantization_report
    truth = moe.fp64(model, copy.deepcopy(plain)).get_submodule(EXPERTS)
    for name, shape in (("gate_up_proj", (4, 96, 32)), ("down_proj", (4, 32, 48))):
        entry = next(e for e in report.layers if e.path == f"{EXPERTS}.{name}")
        error = relative(getattr(truth, name), getattr(plain.get_submodule(EXPERTS), name))
        assert entry.relative_error == pytest.approx(error, rel=1e-4)
        assert entry.shape == shape and entry.group_size == 8
        assert "x".join(map(str, shape)) in str(report)
    assert QuantizationReport.from_dict(report.to_dict()) == report
    weights = sum(math.prod(entry.shape) for entry in report.layers)
    assert report.of_16_bits == report.bytes_after / (2 * weights)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_round_trip(name, format, tmp_path):
    build, ids = moe.MODELS[name], tokens()
    model = quantized(build(), format)
    expected, state = model(ids).logits, snapshot(model)
    save_quantized(model, tmp_path)
    for target in (model.config, build(), build().bfloat16()):
        loaded = load_quantized(target, tmp_path)
        assert_same_state(loaded, state)
        assert torch.equal(loaded(ids).logits, expected)
        assert loaded.quantization_report == model.quantization_report
        assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]


def test_a_file_of_other_experts_is_refused(tmp_path):
    model = quantized(moe.mixtral())
    save_quantized(model, tmp_path)
    other = moe.mixtral(num_local_experts=5)
    state = snapshot(other)
    with pytest.raises(AdapterError, match="gate_up_proj is 5x96x32, in the file experts of 4x96"):
        load_quantized(other, tmp_path)
    assert_same_state(other, state)
    own = moe.mixtral()
    own.model.layers[0].mlp.experts = nn.Linear(2, 2)
    with pytest.raises(AdapterError, match="down_proj is Linear, in the file experts of 4x32x48"):
        load_quantized(own, tmp_path)

    def cut(values, tensors):
        name = f"{EXPERTS}.down_proj_scale"
        tensors[name] = tensors[name][:3].clone()

    rewritten(tmp_path, cut)
    with pytest.raises(AdapterError, match="damaged .*another number of experts"):
        load_quantized(moe.mixtral(), tmp_path)
    assert f"{EXPERTS}.gate_up_proj_data" in load_file(tmp_path / FILE)


def test_experts_under_two_names_are_packed_and_saved_once(tmp_path):
    def twice() -> nn.Module:
        model = moe.mixtral(num_hidden_layers=2)
        model.model.layers[1].mlp.experts = model.get_submodule(EXPERTS)
        return model

    model, ids = quantized(twice()), tokens()
    assert len(experts_in(model)) == 1
    save_quantized(model, tmp_path)
    loaded = load_quantized(twice(), tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.model.layers[1].mlp.experts is loaded.model.layers[0].mlp.experts
    with pytest.raises(AdapterError, match="in the file another name of"):
        load_quantized(moe.mixtral(num_hidden_layers=2), tmp_path)


def test_a_moved_module_is_not_saved(tmp_path):
    model = quantized(moe.mixtral())
    model.model.layers[0].mlp.experts = nn.Sequential(model.model.layers[0].mlp.experts)
    with pytest.raises(AdapterError, match="experts.gate_up_proj.*: wrapped, moved or replaced"):
        save_quantized(model, tmp_path)


def test_copies_pickles_and_casts_keep_the_packed_numbers():
    model, ids = quantized(moe.gpt_oss(), "fp8"), tokens()
    expected, state = model(ids).logits, snapshot(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, expected)
        assert type(other.get_submodule(EXPERTS)) is type(model.get_submodule(EXPERTS))
    empty = quantized(moe.gpt_oss(), "fp8")
    empty.load_state_dict(state)
    assert torch.equal(empty(ids).logits, expected)
    experts = model.half().to(torch.bfloat16).get_submodule(EXPERTS)
    assert experts.down_proj.dtype == torch.bfloat16
    with pytest.raises(AttributeError, match="down_proj is packed"):
        experts.down_proj = torch.ones(2)
    model.float()
    for part in ("down_proj_data", "gate_up_proj_scale"):
        assert torch.equal(getattr(experts, part), state[f"{EXPERTS}.{part}"])


def test_generating_follows_the_dequantized_model():
    torch.manual_seed(0)
    plain = moe.mixtral()
    model = quantized(copy.deepcopy(plain))
    truth, ids = moe.fp64(model, plain), tokens(2, 5)
    options = dict(max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(ids, **options), truth.generate(ids, **options))


def test_checkpointing_changes_no_gradient():
    model, ids = quantized(adapted(moe.mixtral(), **ATTENTION)).train(), tokens()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model, use_reentrant=False)
        model.zero_grad()
        torch.manual_seed(5)
        model(input_ids=ids, labels=ids).loss.backward()
        results.append(gradients(model))
    assert results[0] and all(torch.equal(results[1][name], g) for name, g in results[0].items())


@pytest.mark.parametrize("bits", [8, 16])
def test_a_hybrid_over_packed_experts_learns(bits):
    """A bottleneck on the block of experts, LoRA below it."""
    torch.manual_seed(0)
    model = quantized(moe.qwen3_moe(), activation_bits=bits)
    model = adapted(
        model, fill=False, target_modules=["q_proj", "v_proj", "mlp"],
        apply_lora_to=["q_proj", "v_proj"], adapter_dropout=0.0,
    ).train()  # fmt: skip
    before, ids = snapshot(model), tokens(4, 12)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.08
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved and all(name.startswith("hybrid_adapter.") for name in moved)


def test_an_adapter_knows_its_base_in_any_bits(tmp_path):
    base = moe.gpt_oss()
    forms = (copy.deepcopy(base), quantized(copy.deepcopy(base)), quantized(base, "int4"))
    for index, form in enumerate(forms):
        adapted(copy.deepcopy(form), **ATTENTION).save_adapter_parameters(tmp_path / str(index))
        for other in forms:
            load_hybrid_adapter(copy.deepcopy(other), tmp_path / str(index), strict=True)
    with pytest.raises(AdapterError):
        load_hybrid_adapter(quantized(moe.gpt_oss()), tmp_path / "0", strict=True)


def test_an_interrupted_call_goes_on(monkeypatch):
    model, ids = moe.mixtral(num_hidden_layers=2), tokens()
    whole = quantized(copy.deepcopy(model))
    expected = model(ids).logits
    with monkeypatch.context() as patch:
        counts = lambda *args: "down_proj_scale" in args  # noqa: E731
        patch.setattr(
            nn.Module, "register_buffer", interrupted_at(2, nn.Module.register_buffer, counts)
        )
        with pytest.raises(KeyboardInterrupt):
            quantized(model)
    assert len(experts_in(model)) == 1
    assert relative(model(ids).logits, expected) < 0.1
    quantized(model)
    assert_same_state(model, snapshot(whole))
    assert model.quantization_report == whole.quantization_report


@pytest.mark.parametrize("padded", [False, True])
def test_data_weighs_the_columns_of_each_expert(padded):
    """By the tokens that were sent to it, and by what its own first matrix made of them."""
    torch.manual_seed(0)
    model, ids = moe.mixtral(), tokens(4, 12)
    experts, seen = model.get_submodule(EXPERTS), []
    handle = experts.register_forward_hook(lambda module, args, y: seen.append(args))
    model(ids)
    handle.remove()
    ((hidden, chosen, _),) = seen
    batch = {"input_ids": ids}
    if padded:
        rest = torch.zeros(4, 50, dtype=torch.long)
        mask = torch.cat([torch.ones_like(ids), rest], 1)
        batch = {"input_ids": torch.cat([ids, rest], 1), "attention_mask": mask}
    found = column_importance(model, {"layer": experts}, [batch])
    assert not experts._forward_pre_hooks
    for expert in range(4):
        rows = hidden[(chosen == expert).any(1)].double()
        gate, up = (rows @ experts.gate_up_proj[expert].double().T).chunk(2, -1)
        inner = nn.functional.silu(gate) * up
        for name, x in (("gate_up_proj", rows), ("down_proj", inner)):
            expected = x.detach().square().mean(0).float()
            got = found[matrix_of("layer", name, expert)]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    plain, weighed = (quantized(copy.deepcopy(model), "int4", data=d) for d in (None, [batch]))
    errors = []
    for packed in (plain, weighed):
        experts_now = packed.get_submodule(EXPERTS)
        numbers = torch.stack([w.dequantize() for w in experts_now.down_proj])
        weights = torch.stack([found[matrix_of("layer", "down_proj", e)] for e in range(4)])
        error = (numbers - experts.down_proj.detach()).square() * weights[:, None]
        errors.append(error.sum().item())
    assert errors[1] < errors[0]


def test_an_expert_that_no_data_reached_is_rounded_as_without():
    torch.manual_seed(0)
    model = moe.mixtral(num_local_experts=8, num_experts_per_tok=1)
    batch = {"input_ids": tokens(1, 2)}
    plain, weighed = (quantized(copy.deepcopy(model), "int4", data=d) for d in (None, [batch]))
    pairs = zip(*(m.get_submodule(EXPERTS).down_proj for m in (plain, weighed)), strict=True)
    assert 6 <= sum(torch.equal(one.data, other.data) for one, other in pairs) < 8


class OwnForward(transformers.models.mixtral.modeling_mixtral.MixtralExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states


class OwnTensor(transformers.models.mixtral.modeling_mixtral.MixtralExperts):
    def __init__(self, config):
        super().__init__(config)
        self.scales = nn.Parameter(torch.ones(4))


def other_class(cls: type):
    def change(model: nn.Module) -> nn.Module:
        model.model.layers[0].mlp.experts = cls(model.config)
        return model

    return change


def own_forward(model: nn.Module) -> nn.Module:
    experts = model.get_submodule(EXPERTS)
    experts.forward = experts.forward
    return model


def tied(model: nn.Module) -> nn.Module:
    model.twin = nn.Module()
    model.twin.weight = model.get_submodule(EXPERTS).down_proj
    return model


def parallel(model: nn.Module) -> nn.Module:
    model.get_submodule(EXPERTS)._is_expert_parallel = True
    return model


LEFT = {
    "a class's own forward": (other_class(OwnForward), "no linear layer: gate_up_proj, down_proj"),
    "a tensor of its own": (other_class(OwnTensor), "no linear layer: gate_up_proj, down_proj"),
    "spread over devices": (parallel, "no linear layer: gate_up_proj, down_proj"),
    "a module's own forward": (own_forward, "it carries a forward of its own"),
    "tied": (tied, "its down_proj is also twin.weight"),
}


@pytest.mark.parametrize("what", LEFT)
def test_experts_that_stay_as_they_were_are_reported(what):
    change, reason = LEFT[what]
    model = change(moe.mixtral())
    stacked = sum(
        model.get_parameter(f"{EXPERTS}.{n}").numel() for n in ("gate_up_proj", "down_proj")
    )
    share = f"{stacked / (stacked + 2 * 32 * 32 + 2 * 16 * 32):.0%}"
    with pytest.warns(UserWarning, match=f"{share} of the weights that could be packed"):
        quantized(model)
    assert model.quantization_report.skipped[EXPERTS].startswith(reason)
    assert not experts_in(model)


def test_experts_of_a_form_that_transformers_does_not_state():
    config = transformers.Llama4TextConfig(
        **SMALL, **TOKENS, intermediate_size_mlp=48, num_key_value_heads=2, num_local_experts=2,
        moe_layers=[0], head_dim=8,
    )  # fmt: skip
    model = transformers.Llama4ForCausalLM(config)
    with pytest.warns(UserWarning, match="could be packed are experts held as one parameter"):
        quantized(model)
    skipped = model.quantization_report.skipped["model.layers.0.feed_forward.experts"]
    assert skipped.startswith("no linear layer: gate_up_proj, down_proj hold many matrices each")


def test_experts_are_left_where_asked_and_refused_where_they_do_not_fit():
    model = moe.mixtral()
    with pytest.warns(UserWarning, match="experts held as one parameter"):
        quantized(model, leave=["model.layers.0.mlp"])
    assert model.quantization_report.skipped[EXPERTS] == "left as it is, as asked"
    assert is_experts(model.get_submodule(EXPERTS))
    with torch.no_grad():
        broken = moe.mixtral()
        broken.get_parameter(f"{EXPERTS}.down_proj")[2, 3, 4] = math.nan
    with pytest.raises(AdapterError, match=r"experts.down_proj holds inf or nan"):
        quantize_adapter_model(broken)
    with pytest.raises(AdapterError, match=r"experts.down_proj has 44 inputs"):
        quantized(moe.mixtral(intermediate_size=44), "int4")


def test_one_expert_alone_is_packed():
    model = quantized(moe.mixtral(num_local_experts=1, num_experts_per_tok=1))
    assert list(experts_in(model)) == [EXPERTS]


def test_packed_experts_are_no_target_but_their_block_is():
    model = quantized(moe.mixtral())
    with pytest.raises(AdapterError, match=r"experts is a QuantizedMix.*: name the block around"):
        adapted(model, target_modules=["experts"], apply_lora_to=[])
    model, ids = adapted(model, target_modules=["mlp"], apply_lora_to=[]), tokens()
    with model.disable_adapter():
        plain = model(ids).logits
    assert relative(model(ids).logits, plain) > 1e-3
