"""Constants kept for inference: never stale, never in the way, and no part of a copy."""

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils import prune

from artemis import HybridAdapterConfig, add_hybrid_adapter_to_model
from artemis.layers import frozen
from artemis.quantization import quantize_adapter_model
from artemis.utils.hybrid_adapter import set_dynamic_rank_allocation
from tests.artemis.models import adapted, bert, gpt2, llama, tokens


@torch.no_grad()
def logits(model, ids):
    return model.eval()(input_ids=ids).logits


def anew(model, ids):
    """What the model computes with nothing kept: the truth about its tensors of now."""
    config = model.hybrid_adapter.config
    config.cache_constants = False
    y = logits(model, ids)
    config.cache_constants = True
    return y


def kept(model) -> int:
    return sum(site.frozen is not None for site in model.hybrid_adapter.sites.values())


def assert_fresh(model, ids):
    """Twice: when the constants are made, and when they are there."""
    wanted = anew(model, ids)
    for _ in range(2):
        torch.testing.assert_close(logits(model, ids), wanted, rtol=2e-4, atol=2e-4)


@pytest.fixture
def ready():
    """A model that has computed once without gradients, and its input."""
    model, ids = adapted(llama()), tokens()
    assert_fresh(model, ids)
    assert kept(model) == 14
    return model, ids


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("make, targets", [(llama, {}), (bert, {}), (gpt2, {})])
def test_the_same_results(make, targets, bits):
    settings = {}
    if make is not llama:
        names = {"gpt2": ("c_attn", "c_fc", "c_proj"), "bert": ("query", "key", "dense")}
        settings["target_modules"] = names[make.__name__]
        settings["apply_lora_to"] = names[make.__name__][:1]
    model = adapted(make(), **settings)
    if bits:
        quantize_adapter_model(model, bits=bits, progress=False, adapter_bits=32)
    assert_fresh(model, tokens())
    assert kept(model) == len(model.hybrid_adapter.sites)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_fresh_hybrid_is_its_base_bit_for_bit(rows, bits, dtype):
    model, ids = llama().to(dtype), tokens(1, rows)
    if bits:
        quantize_adapter_model(model, bits=bits, progress=False)
    wanted = logits(model, ids)
    add_hybrid_adapter_to_model(model, HybridAdapterConfig(lora_rank=4, adapter_size=8))
    for _ in range(2):
        assert torch.equal(logits(model, ids), wanted)
    assert kept(model) == 14


@pytest.mark.parametrize("role", ["lora_b", "up", "bias_up"])
def test_one_term_is_enough_to_count(role):
    model, ids = adapted(llama(), fill=False), tokens()
    base = logits(model, ids)
    copies_into(role)(model, ids)
    assert not torch.allclose(logits(model, ids), base)
    assert_fresh(model, ids)


def steps_once(model, ids):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    model.eval()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def steps_behind_the_counter(model, ids):
    model.eval()(input_ids=ids, labels=ids).loss.backward()
    for parameter in model.hybrid_adapter.parameters():
        parameter.data.add_(parameter.grad, alpha=-0.1)  # as older optimizers do


def copies_into(role):
    @torch.no_grad()
    def change(model, ids):
        for parameter in getattr(model.hybrid_adapter, role).values():
            parameter.copy_(torch.randn_like(parameter) * 0.3)

    change.__name__ = f"copies into {role}"
    return change


def replaces_storage(model, ids):
    for parameter in model.hybrid_adapter.parameters():
        parameter.data = parameter.data * 1.5


def replaces_storage_twice(model, ids):
    """The second storage may lie where the first did."""
    for parameter in model.hybrid_adapter.parameters():
        parameter.data = parameter.data * 1.5
        parameter.data = parameter.data * 1.5


def replaces_a_parameter(model, ids):
    table = model.hybrid_adapter.up
    for key in list(table):
        table[key] = torch.nn.Parameter(torch.randn_like(table[key]))


@torch.no_grad()
def changes_the_base(model, ids):
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.mul_(-1.0)


def allocates(model, ids):
    scores = {path: 1.0 + i for i, path in enumerate(model.hybrid_adapter.sites)}
    set_dynamic_rank_allocation(model, scores, min_rank=2, max_rank=6)


def merges(model, ids):
    model.merge_adapter()


def merges_and_unmerges(model, ids):
    model.merge_adapter()
    assert_fresh(model, ids)
    model.unmerge_adapter()


def quantizes(model, ids):
    quantize_adapter_model(model, bits=8, progress=False, adapter_bits=32)


def quantizes_all(model, ids):
    quantize_adapter_model(model, bits=8, progress=False, adapter_bits=8)


def casts(model, ids):
    model.double()


def changes_the_scale(model, ids):
    model.hybrid_adapter.config.scaling_factor *= 3


CHANGES = (
    steps_once, steps_behind_the_counter, *(copies_into(role) for role in ("lora_a", "lora_b",
    "down", "up", "bias_down", "bias_up", "gain")), replaces_storage, replaces_storage_twice,
    replaces_a_parameter, changes_the_base, allocates, merges, merges_and_unmerges, quantizes,
    quantizes_all, casts, changes_the_scale,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_change_goes_unseen(change, ready):
    model, ids = ready
    before = logits(model, ids)
    change(model, ids)
    after = logits(model, ids)
    torch.testing.assert_close(after, anew(model, ids), rtol=2e-3, atol=2e-3)
    assert_fresh(model, ids)
    if change not in (merges, merges_and_unmerges, casts):
        assert not torch.allclose(before.float(), after.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "told", [lambda model: model.hybrid_adapter.forget(), lambda model: model.train()],
    ids=["forget", "train"],
)  # fmt: skip
def test_a_write_that_torch_does_not_count_is_told(told, ready):
    model, ids = ready
    for parameter in model.hybrid_adapter.parameters():
        parameter.data.mul_(2.0)
    told(model)
    assert_fresh(model, ids)


@torch.no_grad()
def written_through_data(model, share: float):
    """As TRL has a reference model follow the policy: torch counts no such change."""
    for name, parameter in model.named_parameters():
        if "hybrid_adapter" in name:
            parameter.data.mul_(1 - share).add_(torch.randn_like(parameter), alpha=share)


@pytest.mark.parametrize("share", [1.0, 0.01])
def test_a_pass_over_several_positions_sees_what_torch_does_not_count(share, ready):
    """And with it the tokens that are decoded after it."""
    model, ids = ready
    before = logits(model, ids)
    written_through_data(model, share)
    assert not torch.equal(logits(model, ids), before)
    assert_fresh(model, ids)
    assert_fresh(model, ids[:, :1])


def test_a_shared_tensor_written_so_is_cast_anew(ready):
    """Also for a layer that has no constants yet, where another one's cast lies ready."""
    model, ids = adapted(llama().bfloat16()), tokens()
    logits(model, ids)
    written_through_data(model, 1.0)
    model.hybrid_adapter.sites["model.layers.0.self_attn.q_proj"].frozen = None
    wanted = logits(copy.deepcopy(model), ids)
    assert torch.equal(logits(model, ids), wanted)


@pytest.mark.parametrize("positions, kept", [(1, True), (2, False)])
def test_a_gpu_is_not_waited_for(positions, kept, ready, monkeypatch):
    """Its numbers are not looked at; so nothing is kept through several positions."""
    layer = ready[0].model.layers[0].mlp.gate_proj
    monkeypatch.setattr(frozen, "takes_constants", lambda module, x: True)
    x = torch.randn(2, positions, 32)
    on_gpu = SimpleNamespace(dtype=x.dtype, shape=x.shape, dim=x.dim, is_cuda=True)
    assert (frozen._ready(layer, on_gpu, layer.adapter) is not None) == kept
    assert (layer.adapter.frozen is not None) == kept


def test_loading_other_parameters(ready, tmp_path):
    model, ids = ready
    other = adapted(copy.deepcopy(llama()))
    other.save_adapter_parameters(tmp_path)
    before = logits(model, ids)
    model.load_adapter_parameters(tmp_path)
    assert_fresh(model, ids)
    assert not torch.allclose(before, logits(model, ids))
    state = {name: torch.randn_like(t) * 0.1 for name, t in model.state_dict().items()}
    model.load_state_dict(state)
    assert_fresh(model, ids)


def test_switched_off_and_on(ready):
    model, ids = ready
    wanted = logits(model, ids)
    with model.disable_adapter():
        assert not torch.allclose(logits(model, ids), wanted)
    assert torch.equal(logits(model, ids), wanted)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_start_without(how, ready):
    model, ids = ready
    other = how(model)
    assert kept(other) == 0 and not other.hybrid_adapter.casts._made
    with torch.no_grad():
        for parameter in other.hybrid_adapter.parameters():
            parameter.mul_(2.0)
    wanted = logits(model, ids)
    assert_fresh(other, ids)
    assert torch.equal(logits(model, ids), wanted)


def test_no_part_of_what_is_saved(ready):
    model, _ = ready
    assert model.state_dict().keys() == adapted(llama()).state_dict().keys()
    torch.save(model.state_dict(), io.BytesIO())


def test_shared_tensors_are_cast_once():
    model, ids = adapted(llama().bfloat16()), tokens()
    logits(model, ids)
    sites = model.hybrid_adapter.sites
    first, second = (sites[f"model.layers.{i}.mlp.gate_proj"].frozen.linear.adapter for i in (0, 1))
    assert first.up.data_ptr() == second.up.data_ptr() and first.down is not second.down


def test_training_drops_them(ready):
    model, ids = ready
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert kept(model) == 0 and not model.hybrid_adapter.casts._made


def test_other_sizes_drop_them(ready):
    """They hold tensors of the old sizes, whose memory is to be free."""
    model, ids = ready
    allocates(model, ids)
    assert kept(model) == 0 and not model.hybrid_adapter.casts._made


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_after_inference(mode, ready):
    """What inference made is never part of a graph."""
    model, ids = ready
    model.hybrid_adapter.forget()
    with mode():
        model(input_ids=ids)
    assert kept(model) == 14
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.hybrid_adapter.parameters())
    assert_fresh(model, ids)


def test_not_for_tensors_that_nobody_counts_changes_of():
    with torch.inference_mode():
        model, ids = adapted(llama()), tokens()
        model(input_ids=ids)
        assert kept(model) == 0


def test_not_in_the_way(ready, monkeypatch):
    """Under autocast, with gradients of either mode, by the reference, or where turned off."""
    model, ids = ready
    model.hybrid_adapter.forget()
    monkeypatch.setattr(frozen, "FrozenLinear", None)  # a call would raise
    model(input_ids=ids)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids)
    with torch.no_grad(), forward_ad.dual_level():
        model(input_ids=ids)
    for name, value in {"impl": "reference", "cache_constants": False}.items():
        config = model.hybrid_adapter.config
        before = getattr(config, name)
        setattr(config, name, value)
        logits(model, ids)
        setattr(config, name, before)
    assert kept(model) == 0


class Ensemble(nn.Module):
    """One layer of a model, and the adapter that it looks its tensors up in."""

    def __init__(self, layer, bank):
        super().__init__()
        self.layer, self.bank = layer, bank

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.gate_proj"])
@torch.no_grad()
def test_adapters_mapped_over_one_base(name, ready):
    """By torch.vmap: x is a plain tensor, and the adapter's tensors have no address."""
    model, _ = ready
    both = Ensemble(model.model.layers[0].get_submodule(name), model.hybrid_adapter)
    x = torch.randn(3, 5, 32)
    bank = {f"bank.{name}": tensor for name, tensor in model.hybrid_adapter.named_parameters()}
    stacked = {name: torch.stack((tensor, 0.5 * tensor)) for name, tensor in bank.items()}
    wanted = []
    for place in range(2):
        one = {name: tensor[place] for name, tensor in stacked.items()}
        wanted.append(functional_call(both, one, x))
    mapped = torch.vmap(lambda tensors: functional_call(both, tensors, x))(stacked)
    torch.testing.assert_close(mapped, torch.stack(wanted))


def test_generates_the_same_tokens(ready):
    model, ids = ready
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    wanted = model.generate(ids, **options)
    model.hybrid_adapter.config.cache_constants = False
    assert torch.equal(model.generate(ids, **options), wanted)


@pytest.mark.parametrize("bits", [None, 8])
@torch.no_grad()
def test_a_bias_that_each_call_makes_is_no_constant(bits):
    """Pruning keeps it in parameters of its own, from which a hook makes it."""
    model, ids = adapted(bert(), target_modules=["query"], apply_lora_to=["query"]).eval(), tokens()
    layer = next(m for name, m in model.named_modules() if name.endswith("query"))
    prune.random_unstructured(layer, "bias", 0.5)
    if bits:
        quantize_adapter_model(model, bits=bits, progress=False, adapter_bits=32)
    before = model(ids).logits
    layer.bias_orig.add_(1.0)
    assert not torch.equal(model(ids).logits, before)
