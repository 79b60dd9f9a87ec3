"""A fused model: what is fused, and that it computes and behaves as the model does."""

import copy
import io
import pickle
from collections import Counter
from types import FunctionType

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from artemis import (
    AdapterError,
    HybridAdapterConfig,
    add_hybrid_adapter_to_model,
    analyze_layer_importance,
    fuse_model,
    load_hybrid_adapter,
    quantize_adapter_model,
    set_dynamic_rank_allocation,
    unfuse_model,
)
from artemis.fusing import forwards, is_fused, originals
from artemis.fusing.activations import _BY_NAME
from artemis.fusing.forwards import _rotary
from artemis.fusing.originals import APPLY_ROTARY, same_code
from tests.artemis.data import batches
from tests.artemis.models import (
    TOKENS,
    adapted,
    assert_same_state,
    enable_checkpointing,
    gpt2,
    gradients,
    llama,
    snapshot,
    tokens,
)

#: Family -> norms, gates and rotary embeddings of two layers that are fused, classes that are left.
FAMILIES = {
    "Llama": ((5, 2, 2), set()),
    "Mistral": ((5, 2, 2), set()),
    "Qwen2": ((5, 2, 2), set()),
    "Qwen3": ((9, 2, 2), set()),  # norms on q and k
    "Olmo2": ((9, 2, 0), {"Olmo2Attention"}),
    "Gemma": ((0, 2, 2), {"GemmaRMSNorm"}),  # multiplies by 1 + weight
    "Phi3": ((5, 0, 0), {"Phi3MLP", "Phi3Attention"}),  # gate and up in one, part of a head turned
    "NanoChat": ((0, 0, 0), {"NanoChatRMSNorm", "NanoChatAttention"}),
}
fp32 = dict(rtol=2e-5, atol=1e-5)


def family(name: str, **changes) -> nn.Module:
    """2 layers, hidden 32; weights so large that attention chooses, and in norms too."""
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2, **TOKENS,
    )  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**sizes | changes)
    return with_norms(getattr(transformers, f"{name}ForCausalLM")(config).eval())


@torch.no_grad()
def with_norms(model: nn.Module) -> nn.Module:
    """Give norms weights: at one, as they start, a lost one would not show."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
    return model


def fused(model: nn.Module) -> nn.Module:
    """A fused copy."""
    model = copy.deepcopy(model)
    fuse_model(model)
    assert any(map(is_fused, model.modules()))
    return model


def outcome(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, and the gradients of everything that trains."""
    logits = model(ids).logits
    model.zero_grad()
    (logits.float() * torch.linspace(-1, 1, logits.shape[-1])).mean().backward()
    return {"logits": logits.detach()} | gradients(model)


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], **limits) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        scale = tensor.abs().max().clamp_min(1e-30)
        torch.testing.assert_close(found[name] / scale, tensor / scale, msg=name, **limits)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_fused_and_what_is_left(name):
    model = family(name)
    counts, left = FAMILIES[name]
    report = fuse_model(model)
    assert (report.norms, report.gates, report.rotary) == counts
    assert {entry.class_name for entry in report.left} == left
    assert sum(map(is_fused, model.modules())) == sum(counts)
    assert all(f"{e.class_name} ({e.count})" in str(report) for e in report.left)
    assert fuse_model(model) == report  # and nothing twice
    assert sum(map(is_fused, model.modules())) == sum(counts)


def test_a_model_of_nothing_known_is_left():
    model = gpt2()
    model.set_attn_implementation("eager")
    report = fuse_model(model)
    assert str(report) == "0 norms, 0 gated MLPs and 0 rotary embeddings fused"
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_the_models(name):
    model, ids = family(name), tokens(3, 17)
    wanted = outcome(model, ids)
    fuse_model(model)
    found = outcome(model, ids)
    assert_close(found, wanted, **fp32)
    unfuse_model(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert_close(outcome(model, ids), wanted, rtol=0, atol=0)


@pytest.fixture
def calls(monkeypatch) -> Counter[str]:
    """How often each operation has run."""
    counted: Counter[str] = Counter()

    def counting(name):
        operation = getattr(forwards, name)

        def call(*args):
            counted[name] += 1
            return operation(*args)

        return call

    for name in ("rms_norm", "gated_activation", "rotary_embedding"):
        monkeypatch.setattr(forwards, name, counting(name))
    return counted


def test_fused_modules_run_the_operations(calls):
    model, ids = family("Qwen3"), tokens()
    model(ids)
    assert not calls
    fuse_model(model)
    model(ids)
    assert calls == dict(rms_norm=9, gated_activation=2, rotary_embedding=2)


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_errors_in_bf16_are_no_larger(name):
    """Against the fp64 model; the operations round once where the original does several times."""
    model, ids = family(name).bfloat16(), tokens(8, 33)
    truth = outcome(copy.deepcopy(model).double(), ids)
    plain, found = outcome(model, ids), outcome(fused(model), ids)

    def error(results):
        parts = [(results[n].double() - y).norm() / y.norm() for n, y in truth.items()]
        return torch.stack(parts).square().mean().sqrt()

    assert found["logits"].dtype == torch.bfloat16
    assert error(found) <= 1.1 * error(plain)


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_under_autocast(calls, name):
    """Norms of q and k, in bf16, have weights in float32 and stay the originals'."""
    model, ids = family(name), tokens(4, 17)
    truth = outcome(copy.deepcopy(model).double(), ids)["logits"]
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = outcome(model, ids), outcome(fused(model), ids)
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in plain.items()}
    assert calls == dict(rms_norm=5, gated_activation=2, rotary_embedding=2)
    error = [(y["logits"].double() - truth).norm() for y in (found, plain)]
    assert error[0] <= 1.25 * error[1]  # attention rounds its scores, as the plain one does


def test_norms_of_another_dtype_return_what_they_did():
    """As under autocast, where q is in 16 bits and its norm's weight is not."""
    norm = family("Llama").model.norm
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    wanted = norm(x)
    assert wanted.dtype == torch.float32
    fuse_model(norm)
    assert torch.equal(norm(x), wanted)


def test_arguments_by_name():
    model, x = family("Llama"), torch.randn(3, 32)
    wanted = model.model.norm(x), model.model.layers[0].mlp(x)
    fuse_model(model)
    found = model.model.norm(hidden_states=x), model.model.layers[0].mlp(x=x)
    assert_close(dict(enumerate(found)), dict(enumerate(wanted)), **fp32)


@pytest.mark.parametrize(
    "changes",
    [
        dict(q=(2, 5, 5, 8), k=(2, 5, 5, 8), unsqueeze_dim=2),  # as many heads as tokens
        dict(q=(2, 4, 5, 9), k=(2, 2, 5, 9), cos=(2, 5, 9), sin=(2, 5, 9)),  # odd
        dict(q=(1, 4, 5, 8), k=(1, 2, 5, 8)),  # q and k are spread over cos's rows
        dict(q=(5, 4, 8), k=(5, 2, 8), cos=(5, 8), sin=(5, 8)),  # tokens of no batch
        dict(dtype=torch.bfloat16),  # cos is wider, and the original returns its dtype
    ],
    ids=["heads-last", "odd", "spread", "no-batch", "wider"],
)
def test_rotary_embeddings_of_another_kind_are_the_originals(changes):
    shapes = dict(q=(2, 4, 5, 8), k=(2, 2, 5, 8), cos=(2, 5, 8), sin=(2, 5, 8)) | changes
    dim, dtype = shapes.pop("unsqueeze_dim", 1), shapes.pop("dtype", torch.float32)
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {name: tensors[name].to(dtype) for name in "qk"}
    original = modeling_llama.apply_rotary_pos_emb
    wanted = original(**tensors, unsqueeze_dim=dim)
    found = _rotary(original)(**tensors, unsqueeze_dim=dim)
    for y, y_original in zip(found, wanted, strict=True):
        assert y.dtype == y_original.dtype and torch.equal(y, y_original)


class Attention(nn.Module):
    """With defaults and a closure, which Llama's has not."""

    def forward(self, q, factor=3, *, offset=2):
        cos = torch.ones(1, *q.shape[2:])
        return super().__module__, apply_rotary_pos_emb(q, factor * q, cos, offset * cos)


def test_attention_keeps_its_defaults_and_its_closure(calls):
    module, q = Attention(), torch.randn(2, 4, 5, 8)
    wanted = module(q)
    assert fuse_model(module).rotary == 1
    assert module(q)[0] == wanted[0]
    torch.testing.assert_close(module(q)[1], wanted[1], **fp32)
    assert calls == dict(rotary_embedding=2)


@pytest.mark.parametrize("activation", [*_BY_NAME, "quick_gelu", "mish"])
def test_activations(activation):
    """Each as the class that transformers takes for its name; one without a name is left."""
    model, x = family("Llama", hidden_act=activation), 3 * torch.randn(40, 32)
    mlp = model.model.layers[0].mlp
    wanted = mlp(x)
    report = fuse_model(model)
    known = activation in _BY_NAME
    assert report.gates == (2 if known else 0)
    if not known:
        (left,) = report.left
        assert type(mlp.act_fn).__name__ in left.reason
    assert_close({"y": mlp(x)}, {"y": wanted}, **fp32)


@pytest.mark.parametrize(("approximate", "known"), [("none", "gelu"), ("tanh", "gelu_tanh")])
def test_torchs_own_gelu(approximate, known):
    model, x = family("Llama"), 3 * torch.randn(40, 32)
    mlp = model.model.layers[0].mlp
    mlp.act_fn = nn.GELU(approximate)
    wanted = mlp(x)
    assert fuse_model(model).gates == 2
    assert_close({"y": mlp(x)}, {"y": wanted}, **fp32)


def test_an_activation_with_a_hook_is_left():
    model, calls = family("Llama"), []
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *args: calls.append(1))
    report = fuse_model(model)
    assert report.gates == 1 and "hooks" in report.left[0].reason
    model(tokens())
    assert len(calls) == 1


def test_an_activation_hooked_or_replaced_afterwards_counts():
    model, calls, ids = fused(family("Llama")), [], tokens()
    first, second = (layer.mlp for layer in model.model.layers)
    first.act_fn.register_forward_hook(lambda *args: calls.append(1))
    second.act_fn = nn.Tanh()
    found = model(ids).logits
    assert len(calls) == 1
    unfuse_model(model)
    torch.testing.assert_close(found, model(ids).logits, **fp32)


def changed(function: FunctionType, **globals_) -> FunctionType:
    """The same code over other globals."""
    return FunctionType(
        function.__code__, function.__globals__ | globals_, argdefs=function.__defaults__
    )


def test_the_same_code_over_other_functions_is_another():
    original = modeling_llama.apply_rotary_pos_emb
    assert same_code(changed(original), original)
    assert not same_code(changed(original, rotate_half=lambda x: x), original)


def test_code_with_another_default_or_constant_is_another():
    original = modeling_llama.apply_rotary_pos_emb
    other = changed(original)
    other.__defaults__ = (2,)
    assert not same_code(other, original)
    norm = modeling_llama.LlamaRMSNorm.forward
    code = norm.__code__
    constants = tuple(3 if c == 2 else c for c in code.co_consts)
    assert constants != code.co_consts
    assert same_code(changed(norm), norm)
    other = FunctionType(code.replace(co_consts=constants), norm.__globals__)
    assert not same_code(other, norm)


def decorated(function):
    def forward(*args, **kwargs):
        return function(*args, **kwargs)

    forward.__wrapped__ = function
    return forward


class Turns(nn.Module):
    """As the package kernels makes a function."""

    def forward(self, *args):
        return modeling_llama.apply_rotary_pos_emb(*args)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (decorated(modeling_llama.LlamaAttention.forward), "decorated"),
        (
            changed(modeling_llama.LlamaAttention.forward, **{APPLY_ROTARY: Turns()}),
            "is a module",
        ),
    ],
    ids=["decorated", "module"],
)
def test_attention_that_hides_its_function_is_left(forward, reason):
    model = llama()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.__class__ = type("Hidden", (type(attention),), {"forward": forward})
    report = fuse_model(model)
    assert report.rotary == 0 and (report.norms, report.gates) == (5, 2)
    (left,) = report.left
    assert left[:2] == ("Hidden", 2) and reason in left.reason
    model(tokens())


@pytest.mark.parametrize(
    ("operation", "counts"),
    [("rms_norm", (0, 2, 2)), ("gated_activation", (5, 0, 2)), ("rotary_embedding", (5, 2, 0))],
)
def test_a_llama_of_another_meaning_is_left(monkeypatch, operation, counts):
    """As a later transformers may have it; here the meaning of ours is another."""
    own = getattr(originals, operation)

    def other(*args, **kwargs):
        y = own(*args, **kwargs)
        return (y[0], -y[1]) if isinstance(y, tuple) else 1.001 * y

    originals._means_ours.cache_clear()
    monkeypatch.setattr(originals, operation, other)
    report = fuse_model(llama())
    originals._means_ours.cache_clear()
    assert (report.norms, report.gates, report.rotary) == counts
    assert all("this version of transformers" in entry.reason for entry in report.left)


@pytest.mark.parametrize("name", ["LlamaRMSNorm", APPLY_ROTARY])
def test_what_another_library_put_in_place_is_no_original(monkeypatch, name):
    """As Liger does; its functions need not even run here, and are not called."""

    class Other(nn.Module):
        def forward(self, *args):
            raise AssertionError

    model = llama()
    monkeypatch.setattr(modeling_llama, name, Other if name[0].isupper() else Other().forward)
    originals._originals.cache_clear()
    report = fuse_model(model)
    originals._originals.cache_clear()
    assert (report.norms, report.gates, report.rotary) in ((0, 2, 2), (5, 2, 0))
    (left,) = report.left
    assert left.reason.endswith("other code than Llama's")


def test_the_users_random_numbers_are_left_alone():
    originals._means_ours.cache_clear()
    model = family("Llama").train()
    state = torch.get_rng_state()
    fuse_model(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_compiled_it_is_the_models_own_code():
    """One graph, without our operators: Inductor fuses these itself."""
    model, ids, targets = family("Qwen3"), tokens(), []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    wanted = model(ids).logits
    fuse_model(model)
    torch._dynamo.reset()
    found = torch.compile(model, backend=backend, fullgraph=True)(ids).logits
    torch._dynamo.reset()
    assert targets and not any("artemis" in target for target in targets)
    assert torch.equal(found, wanted)
    assert not torch.equal(model(ids).logits, wanted)  # rounding tells the two apart


def test_exported_it_is_the_models_own_code():
    model, ids = fused(family("Llama")), tokens()
    options = dict(input_ids=ids, use_cache=False, return_dict=False)
    program = torch.export.export(model, (), options)
    assert not any("artemis" in str(node.target) for node in program.graph.nodes)
    (logits,) = program.module()(**options)
    unfuse_model(model)
    torch.testing.assert_close(logits, model(ids).logits, **fp32)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded]
)
@torch.no_grad()
def test_copies_are_fused_over_their_own_weights(copied):
    model, ids = fused(family("Llama")), tokens()
    wanted = model(ids).logits
    other = copied(model)
    assert sum(map(is_fused, other.modules())) == sum(map(is_fused, model.modules()))
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(other(ids).logits, wanted)


def test_names_and_files_are_the_models(tmp_path):
    model = family("Llama")
    state = snapshot(model)
    fuse_model(model)
    assert_same_state(model, state)
    model.save_pretrained(tmp_path)
    assert_same_state(transformers.LlamaForCausalLM.from_pretrained(tmp_path), state)
    model.bfloat16()
    assert model(tokens()).logits.dtype == torch.bfloat16


def test_generating_with_a_cache():
    model, prompt = family("Qwen3"), tokens(2, 5)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    wanted = model.generate(prompt, **options)
    assert torch.equal(fused(model).generate(prompt, **options), wanted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant):
    model, ids = fused(family("Llama")).train(), tokens()
    wanted = outcome(model, ids)
    enable_checkpointing(model, use_reentrant=reentrant)
    model.enable_input_require_grads()
    assert_close(outcome(model, ids), wanted, rtol=0, atol=0)


def test_in_inference_mode():
    model, ids = family("Llama"), tokens()
    with torch.inference_mode():
        wanted = model(ids).logits
        fuse_model(model)
        torch.testing.assert_close(model(ids).logits, wanted, **fp32)


def test_without_values(calls):
    """Devices that the operations do not run on take the model's own code."""
    with torch.device("meta"):
        model = llama()
        assert fuse_model(model).norms == 5
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model(torch.zeros(2, 9, dtype=torch.long, device="meta")).logits.shape == (2, 9, 64)
    assert not calls


def test_a_forward_of_its_own_is_left():
    model = family("Llama")
    add_hook_to_module(model.model.norm, ModelHook())
    report = fuse_model(model)
    assert report.norms == 4
    (left,) = report.left
    assert left[:2] == ("LlamaRMSNorm", 1) and "forward of its own" in left.reason
    unfuse_model(model)
    assert "forward" in vars(model.model.norm)


def test_a_hook_set_afterwards_keeps_it_fused_until_taken_off():
    model, ids = family("Llama"), tokens()
    wanted = fused(model)(ids).logits
    fuse_model(model)
    add_hook_to_module(model.model.norm, ModelHook())
    assert torch.equal(model(ids).logits, wanted)
    with pytest.raises(AdapterError, match=r"model\.norm: .*take that off first"):
        unfuse_model(model)
    assert is_fused(model.model.layers[0].mlp)  # nothing has changed
    remove_hook_from_submodules(model)
    assert torch.equal(model(ids).logits, wanted)
    unfuse_model(model)
    assert not any(map(is_fused, model.modules()))


@pytest.mark.parametrize("verb", [fuse_model, unfuse_model])
def test_what_is_no_model(verb):
    with pytest.raises(TypeError, match=r"got a str, allowed: a torch\.nn\.Module"):
        verb("llama")


@pytest.mark.parametrize("first", ["adapter", "fusing"])
@pytest.mark.parametrize(
    "targets", [{}, dict(target_modules=["q_proj", "mlp"], apply_lora_to=["q_proj"])]
)
def test_with_an_adapter(first, targets):
    base, ids = family("Llama"), tokens(3, 17)
    torch.manual_seed(1)
    plain = adapted(copy.deepcopy(base), **targets)
    torch.manual_seed(1)
    if first == "fusing":
        fuse_model(base)
    model = adapted(base, **targets)
    fuse_model(model)
    assert_close(outcome(model, ids), outcome(plain, ids), **fp32)
    assert sum(map(is_fused, model.modules())) == 9


@pytest.mark.parametrize("first", ["quantizing", "fusing"])
def test_with_a_packed_base(first):
    model, ids = family("Llama"), tokens()
    plain = quantize_adapter_model(copy.deepcopy(model), activation_bits=16, progress=False)
    if first == "fusing":
        fuse_model(model)
    quantize_adapter_model(model, activation_bits=16, progress=False)
    fuse_model(model)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, **fp32)
    assert sum(map(is_fused, model.modules())) == 9


def test_importance_and_ranks():
    model = adapted(family("Llama"))
    data = batches(3)
    wanted = analyze_layer_importance(model, data)
    fuse_model(model)
    scores = analyze_layer_importance(model, data)
    assert scores == pytest.approx(wanted, rel=1e-3)
    set_dynamic_rank_allocation(model, scores, 2, 6, verbose=False)
    outcome(model, tokens())


def test_by_the_configuration(tmp_path):
    """From YAML; merging and disabling leave it, removing undoes it, loading does it again."""
    file = tmp_path / "config.yaml"
    file.write_text("hybrid_adapter: {fuse_model: true, lora_rank: 4}")
    base, ids = family("Llama"), tokens()
    model = copy.deepcopy(base)
    add_hybrid_adapter_to_model(model, HybridAdapterConfig.from_yaml(file))
    wanted = fused(base)(ids).logits
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, wanted)
    model.merge_adapter()
    model.unmerge_adapter()
    assert sum(map(is_fused, model.modules())) == 9
    model.save_adapter_parameters(tmp_path)
    loaded = load_hybrid_adapter(copy.deepcopy(base), tmp_path)
    assert loaded.hybrid_adapter.config.fuse_model
    for adapter in (model, loaded):
        assert sum(map(is_fused, adapter.modules())) == 9
        adapter.remove_adapter()
        assert not any("forward" in vars(module) for module in adapter.modules())
        assert torch.equal(adapter(ids).logits, base(ids).logits)


def test_fusing_of_the_users_own_stays():
    model = fused(family("Llama"))
    adapted(model, fuse_model=True)
    model.remove_adapter()
    assert sum(map(is_fused, model.modules())) == 9
    adapted(unfused := family("Llama"))
    assert not any(map(is_fused, unfused.modules()))


def test_removing_is_refused_as_a_whole():
    model, ids = adapted(family("Llama"), fuse_model=True), tokens()
    wanted = model(ids).logits
    add_hook_to_module(model.model.norm, ModelHook())
    with pytest.raises(AdapterError, match=r"model\.norm: each was fused"):
        model.remove_adapter()
    assert torch.equal(model(ids).logits, wanted)


def test_a_few_rows_on_a_cpu_are_torchs(calls):
    """Where its several calls take no longer than one of ours."""
    model, ids = fused(family("Llama")), tokens(7, 1)
    with torch.inference_mode():
        model(ids)
        assert not calls
        model(tokens(8, 1))
    assert calls == dict(rms_norm=5, gated_activation=2, rotary_embedding=2)
