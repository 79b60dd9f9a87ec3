"""The bank: what is shared, what is own, prefixes, and dropout masks shared by readers."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

from artemis.architectures import input_of
from artemis.config import HybridAdapterConfig
from artemis.hybrid import add_hybrid_adapter_to_model
from artemis.layers.bank import AdapterBank
from artemis.layers.seeds import SharedSeed
from artemis.plan import Plan, SiteSpec
from tests.artemis.models import adapted, bert, fill_bank, gradients, llama, t5, tokens


def test_shared_a_down_and_up_own_b_biases_and_gain():
    bank = adapted(llama()).hybrid_adapter
    sizes = {role: len(getattr(bank, role)) for role in ("lora_a", "lora_b", "down", "up", "gain")}
    assert sizes == {"lora_a": 4, "lora_b": 8, "down": 3, "up": 3, "gain": 14}
    assert len(bank.bias_down) == len(bank.bias_up) == 6
    # k and v have one shape, but are different targets: two A's.
    assert {"k_proj/32x16", "v_proj/32x16"} <= set(bank.lora_a)


def test_without_sharing_every_tensor_is_own_and_there_is_no_gain():
    bank = adapted(llama(), shared_parameters=False).hybrid_adapter
    assert len(bank.lora_a) == len(bank.lora_b) == 8 and len(bank.down) == len(bank.up) == 6
    assert len(bank.gain) == 0


def test_without_biases_there_are_none():
    bank = adapted(llama(), adapter_bias=False).hybrid_adapter
    assert len(bank.bias_down) == len(bank.bias_up) == 0


def test_one_regular_expression_still_shares_by_module_name():
    bank = adapted(llama(), target_modules=r".*\.(k|v)_proj").hybrid_adapter
    assert set(bank.lora_a) == {"k_proj/32x16", "v_proj/32x16"}


def test_a_shared_tensor_gets_the_sum_of_its_layers_gradients():
    """Against the same model without sharing, each layer with a copy of the shared values."""
    torch.manual_seed(1)
    shared, ids = adapted(llama()), tokens()
    torch.manual_seed(1)
    own = adapted(llama(), shared_parameters=False)
    bank = shared.hybrid_adapter
    with torch.no_grad():
        for gain in bank.gain.values():
            gain.fill_(1.0)  # unshared tensors have none
    tables = ("lora_a", "lora_b", "down", "up", "bias_down", "bias_up")
    uses: dict[str, list[str]] = {}
    for path, site in own.hybrid_adapter.sites.items():
        wide = bank.sites[path].layout
        for role, (key, _) in site.layout.items():
            getattr(own.hybrid_adapter, role)[key].data.copy_(getattr(bank, role)[wide[role][0]])
            uses.setdefault(f"{role}.{wide[role][0]}", []).append(f"{role}.{key}")
    for model in (shared, own):
        model(ids, labels=ids).loss.backward()
    got, single = gradients(shared), gradients(own)
    assert {name.split(".")[0] for name in uses} == set(tables)
    for name, parts in uses.items():
        total = sum(single[f"hybrid_adapter.{part}"] for part in parts)
        torch.testing.assert_close(got[f"hybrid_adapter.{name}"], total, rtol=1e-4, atol=1e-6)


def test_a_site_uses_the_leading_part_of_a_larger_bank():
    """Ranks 2 and 3 of one A, widths 5 and 6 of one bottleneck: the rest has no effect."""
    config = HybridAdapterConfig(target_modules=["q_proj", "mlp"])
    specs = [
        SiteSpec(f"{i}.{name}", kind, name, 4, 4, size)
        for name, kind, sizes in (("q_proj", "lora", (2, 3)), ("mlp", "block", (5, 6)))
        for i, size in enumerate(sizes)
    ]
    bank = AdapterBank(config, Plan(tuple(specs)))
    assert bank.lora_a["q_proj/4x4"].shape == (3, 4)
    assert (bank.down["mlp/4x4"].shape, bank.up["mlp/4x4"].shape) == ((6, 4), (4, 6))
    assert bank.lora_b["0/q_proj"].shape == (4, 2)
    assert bank.bias_down["1/mlp"].shape == (6,)

    model = adapted(llama())
    site = model.hybrid_adapter.sites["model.layers.0.self_attn.q_proj"]
    other = model.hybrid_adapter.sites["model.layers.1.self_attn.q_proj"]
    small = dataclasses.replace(site.spec, size=2)
    key = site.spec.own_key
    model.hybrid_adapter.lora_b[key] = model.hybrid_adapter.lora_b[key][:, :2].detach()
    site.spec, site.layout = small, {
        role: (k, (2, *shape[1:]) if role == "lora_a" else (*shape[:1], 2) if shape else ())
        for role, (k, shape) in site.layout.items()
    }  # fmt: skip
    x = torch.randn(3, 32)
    layer = model.model.layers[0].self_attn.q_proj
    before, before_other = layer(x), model.model.layers[1].self_attn.q_proj(x)
    with torch.no_grad():
        model.hybrid_adapter.lora_a["q_proj/32x32"][2:].add_(1.0)
    assert torch.equal(layer(x), before)
    assert not torch.equal(model.model.layers[1].self_attn.q_proj(x), before_other)
    assert other.spec.size == 4


def drawn_seeds(model, inputs: dict) -> dict[str, int]:
    """Run one training forward; return the seed that each site took."""
    taken = {}
    model.hybrid_adapter.config.grouping = False  # each asks for itself
    for path, site in model.hybrid_adapter.sites.items():

        def take(member, x, path=path, original=site.seeds.take):
            seed = original(member, x)
            taken[path] = seed.item()
            return seed

        # One SharedSeed has several sites: give each a view of it that notes who asked.
        site.seeds = type("Noted", (), {"take": staticmethod(take)})()
    model.train()
    model(**inputs)
    return taken


def groups(seeds: dict[str, int], prefix: str) -> set[frozenset[str]]:
    """The sets of modules under `prefix` that share a seed, by their last names."""
    sets: dict[int, set[str]] = {}
    for path, seed in seeds.items():
        if path.startswith(prefix):
            sets.setdefault(seed, set()).add(path.rpartition(".")[2])
    return {frozenset(names) for names in sets.values()}


def test_modules_that_read_the_same_tensor_share_a_mask():
    seeds = drawn_seeds(adapted(llama(), lora_dropout=0.2), {"input_ids": tokens()})
    expected = {
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    }
    for layer in range(2):
        assert groups(seeds, f"model.layers.{layer}.") == set(map(frozenset, expected))
    assert len(set(seeds.values())) == 8  # no group shares with another layer's


def test_each_module_draws_its_own_mask_where_told_to():
    model = adapted(llama(), lora_dropout=0.2, dropout_mask_sharing="module")
    seeds = drawn_seeds(model, {"input_ids": tokens()})
    assert len(set(seeds.values())) == len(seeds) == 14


def test_cross_attention_keeps_the_queries_mask_apart():
    names = ["q", "k", "v"]
    model = adapted(t5(), target_modules=names, apply_lora_to=names, lora_dropout=0.2)
    seeds = drawn_seeds(model, {"input_ids": tokens(), "decoder_input_ids": tokens()})
    decoder = "decoder.block.0.layer"
    assert groups(seeds, f"{decoder}.0.SelfAttention") == {frozenset("qkv")}
    assert groups(seeds, f"{decoder}.1.EncDecAttention") == {frozenset("q"), frozenset("kv")}
    assert input_of("x.crossattention.self.query") != input_of("x.crossattention.self.key")


def test_bert_shares_one_mask_for_query_key_and_value():
    names = ["query", "key", "value"]
    model = adapted(bert(), target_modules=names, apply_lora_to=names, lora_dropout=0.2)
    seeds = drawn_seeds(model, {"input_ids": tokens()})
    assert groups(seeds, "bert.encoder.layer.1.") == {frozenset(names)}


def test_without_dropout_nothing_is_drawn():
    model, ids = adapted(llama(), adapter_dropout=0.0), tokens()
    for training in (True, False):
        state = torch.get_rng_state()
        model.train(training)(ids)
        assert torch.equal(torch.get_rng_state(), state)
    model = adapted(llama(), lora_dropout=0.3).eval()
    state = torch.get_rng_state()
    model(ids)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "how", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_dropout_is_switched_off_with_all_of_the_model(how):
    """As TRL does it before it trains (`disable_dropout`); the grouped and the single ones."""
    model, ids = adapted(llama(), lora_dropout=0.3, adapter_dropout=0.3), tokens()
    wanted, names = model.eval()(ids).logits, model.state_dict().keys()
    model = how(model).train()
    assert not torch.allclose(model(ids).logits, wanted, rtol=1e-3)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert not drawn_seeds(model, {"input_ids": ids})
    assert model.state_dict().keys() == names


def test_every_training_forward_draws_new_masks():
    model, ids = adapted(llama(), lora_dropout=0.3).train(), tokens()
    assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("order", ["abc", "cab", "abccab", "aabbcc", "abab"])
def test_a_shared_seed_in_any_order(order):
    """Each member takes a seed once; one that comes again draws the next."""
    seeds, x = SharedSeed(), torch.zeros(1)
    members = {name: seeds.join() for name in "abc"}
    drawn: dict[int, set[str]] = {}
    for name in order:
        used = drawn.setdefault(seeds.take(members[name], x).item(), set())
        assert name not in used
        used.add(name)
    if sorted(order[:3]) == list("abc"):  # whole rounds: one seed each
        assert len(drawn) == len(order) // 3


def test_a_seed_is_for_one_tensor():
    """What a member left untaken is not for the next forward, nor for readers of another tensor."""
    seeds, x, other = SharedSeed(), torch.zeros(1), torch.zeros(1)
    a, b, _ = (seeds.join() for _ in range(3))
    first = seeds.take(a, x)
    assert seeds.take(b, other) is not first
    seeds = copy.deepcopy(seeds)
    drawn_for_other = seeds.seed
    assert seeds.take(a, x) is not drawn_for_other


def test_dropout_is_that_of_the_public_mask():
    """The mask that a layer applies is `dropout_mask` of its seed, on LoRA's input."""
    from artemis_kernels import dropout_mask

    model = adapted(llama(), lora_dropout=0.5, shared_parameters=False).train()
    layer = model.model.layers[0].self_attn.q_proj
    x, config = torch.randn(5, 32), model.hybrid_adapter.config
    y = layer(x)
    keep = dropout_mask((5, 32), 0.5, layer.adapter.seeds.seed, "cpu")
    assert 0.3 < keep.float().mean() < 0.7
    t = layer.adapter.bank.tensors(layer.adapter.layout)
    expected = x @ layer.weight.T + config.scaling_factor * (
        (x * keep * 2) @ t["lora_a"].T @ t["lora_b"].T
    )
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_the_factor_is_not_rounded_to_the_gains_16_bits(shared):
    """In bf16, 0.3 would be 0.3008: too little to see in one number, and it shows in many."""
    model = llama().bfloat16()
    settings = dict(scaling_factor=0.3, adapter_dtype="model", shared_parameters=shared)
    adapted(model, **settings, cache_constants=False)
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(512, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.zero_()
        if shared:
            model.hybrid_adapter.gain["model/layers/0/self_attn/q_proj"].fill_(1)
    t = {role: v.double() for role, v in layer.adapter.bank.tensors(layer.adapter.layout).items()}
    wanted = 0.3 * (x.double() @ t["lora_a"].T @ t["lora_b"].T)
    factor = (layer(x).double() * wanted).sum() / wanted.square().sum()
    assert factor.item() == pytest.approx(1, abs=5e-4)


def test_the_gain_scales_its_layer_alone():
    model = add_hybrid_adapter_to_model(llama(), HybridAdapterConfig())
    fill_bank(model)
    x = torch.randn(3, 32)
    layers = [layer.self_attn.q_proj for layer in model.model.layers]
    with model.disable_adapter():
        base = [layer(x) for layer in layers]
    before = [layer(x) - y0 for layer, y0 in zip(layers, base, strict=True)]
    with torch.no_grad():
        layers[0].adapter.bank.gain["model/layers/0/self_attn/q_proj"].mul_(3.0)
    after = [layer(x) - y0 for layer, y0 in zip(layers, base, strict=True)]
    torch.testing.assert_close(after[0], 3 * before[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after[1], before[1])  # called by itself: its group dissolved
