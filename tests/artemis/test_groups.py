"""Modules that read the same tensor compute together, and nobody can tell but by the time."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from artemis import set_dynamic_rank_allocation
from artemis.layers import sites
from artemis.quantization import quantize_adapter_model
from tests.artemis.models import (
    adapted,
    bert,
    enable_checkpointing,
    fill_bank,
    gpt2,
    gradients,
    llama,
    t5,
    tokens,
)

DROPOUT = {"lora_dropout": 0.2, "adapter_dropout": 0.2}
#: Without gradients too, modules run their operations, not constants made of them.
NO_CACHE = {"cache_constants": False}


def trained(model, ids, seed=0):
    """Loss and gradients of one step of `model`."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_close(actual, wanted):
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6, msg=name)


def all_groups(model):
    sites = model.hybrid_adapter.sites.values()
    return {id(site.group): site.group for site in sites if site.group is not None}.values()


def alone(model):
    """A copy that computes each module alone."""
    other = copy.deepcopy(model)
    other.hybrid_adapter.config.grouping = False
    return other


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the joined operations."""
    counted = []
    for name in ("lora_linear_group", "adapter_linear_group"):
        original = getattr(sites, name)

        def spy(*args, original=original, name=name, **kwargs):
            counted.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(sites, name, spy)
    return counted


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
def test_the_same_step_together_and_alone(options, bits, calls):
    """The loss and every gradient, the seeds of dropout being those of modules on their own."""
    model = adapted(llama(), **{"adapter_dropout": 0.0} | options)
    if bits:
        quantize_adapter_model(model, bits=bits, adapter_bits=32, activation_bits=8, progress=False)
    ids = tokens()
    wanted = trained(alone(model), ids)
    assert not calls
    assert_close(trained(model, ids), wanted)
    assert sorted(calls) == 2 * ["adapter_linear_group"] + 2 * ["lora_linear_group"]
    assert all(not g.dissolved and g.shelf.left is None for g in all_groups(model))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_under_checkpointing(reentrant):
    model, ids = adapted(llama(), **DROPOUT), tokens()
    wanted = trained(model, ids)
    enable_checkpointing(model, use_reentrant=reentrant)
    model.enable_input_require_grads()
    assert_close(trained(model, ids), wanted)


def test_a_group_that_dissolves_is_recomputed_as_it_was_computed():
    """Checkpointing counts what is saved: the first pass joined, so the second must too."""
    model = adapted(llama(), **DROPOUT).train()
    x, other = (torch.randn(2, 5, 32, requires_grad=True) for _ in range(2))

    def crossed(model, x):
        layer = model.model.layers[0].self_attn
        return layer.q_proj(x).sum() + (layer.k_proj(other) * layer.v_proj(other)).sum()

    for step in range(3):  # in later ones modules compute, and ask for masks, one by one
        torch.manual_seed(step)
        wanted = torch.autograd.grad(crossed(copy.deepcopy(model), x), (x, other))
        torch.manual_seed(step)
        loss = checkpoint(crossed, model, x, use_reentrant=False)
        assert model.model.layers[0].self_attn.q_proj.adapter.group.dissolved
        for actual, expected in zip(torch.autograd.grad(loss, (x, other)), wanted, strict=True):
            torch.testing.assert_close(actual, expected)


def test_outputs_are_handed_over_only_for_the_very_same_tensor(calls):
    model = adapted(llama()).eval()
    layer, single = model.model.layers[0].self_attn, alone(model).model.layers[0].self_attn
    x = torch.randn(2, 3, 32)
    layer.q_proj(x)
    assert torch.equal(layer.k_proj(x.clone()), single.k_proj(x))
    group = layer.q_proj.adapter.group
    assert group.dissolved and group.shelf.left is None
    for module in (layer.q_proj, layer.v_proj):
        module(x)
    assert len(calls) == 1  # what was wasted once is not wasted twice


@pytest.mark.parametrize("between", ["training", "eval"])
def test_a_pass_without_gradients_between_a_pass_and_its_recomputation(between):
    """It computes gate and up alone, which must not tell recomputation to do the same."""
    model, ids = adapted(llama(), adapter_dropout=0.0), tokens()
    wanted = trained(model, ids)
    enable_checkpointing(model, use_reentrant=False)
    model.enable_input_require_grads()
    model.zero_grad()
    loss = model.train()(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        model.train(between == "training")(ids)
    model.train()
    loss.backward()
    assert_close(gradients(model) | {"loss": loss.detach()}, wanted)


def test_keys_of_a_tensor_of_another_size():
    """Cross attention under a name that nobody knows."""

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = torch.nn.Linear(32, 16)
            self.k_proj, self.v_proj = torch.nn.Linear(24, 16), torch.nn.Linear(24, 16)

        def forward(self, x, other):
            return torch.stack([self.q_proj(x), self.k_proj(other), self.v_proj(other)])

    names = ["q_proj", "k_proj", "v_proj"]
    model = torch.nn.ModuleDict({"attention": Attention()})
    adapted(model, target_modules=names, apply_lora_to=names)
    x, other = torch.randn(2, 32), torch.randn(2, 24)
    wanted = alone(model)["attention"](x, other)
    torch.testing.assert_close(model["attention"](x, other), wanted)
    assert not any(group.dissolved for group in all_groups(model))


def test_what_a_broken_pass_left_goes_when_the_next_begins():
    """With it the graph of all layers before: memory that a retry with fewer rows needs."""
    model, ids = adapted(llama()).train(), tokens()
    last, kept = model.model.layers[1].mlp, []
    last.gate_proj.register_forward_hook(lambda module, args, y: kept.append(weakref.ref(args[0])))
    broken = last.up_proj.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids)
    gc.collect()
    broken.remove()
    first = model.model.layers[0].self_attn.q_proj
    first.register_forward_hook(lambda module, args, y: kept.append(kept[0]()))
    model(ids)
    assert kept[1] is None


@pytest.mark.parametrize("change", ["grad", "training", "autocast", "disabled", "in place"])
def test_outputs_are_handed_over_only_under_the_same_conditions(change):
    model = adapted(llama()).eval()
    layer, single = model.model.layers[0].self_attn, alone(model).model.layers[0].self_attn
    x = torch.randn(2, 3, 32)
    layer.q_proj(x)
    bank = model.hybrid_adapter
    if change == "grad":
        with torch.no_grad():
            assert not layer.k_proj(x).requires_grad
    elif change == "training":
        layer.k_proj.train()
        torch.testing.assert_close(layer.k_proj(x), single.k_proj(x))
    elif change == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.k_proj(x).dtype == torch.bfloat16
    elif change == "disabled":
        bank.enabled = False
        assert torch.equal(layer.k_proj(x), torch.nn.functional.linear(x, layer.k_proj.weight))
    else:
        x.mul_(2)
        torch.testing.assert_close(layer.k_proj(x), single.k_proj(x))


@pytest.mark.parametrize("change", ["values", "size"])
def test_outputs_are_not_handed_over_after_the_adapter_changed(change):
    model = adapted(llama(), shared_parameters=False, **NO_CACHE).eval()
    layer, x = model.model.layers[0].self_attn, torch.randn(2, 3, 32)
    with torch.no_grad():
        layer.q_proj(x)
        if change == "values":
            fill_bank(model)
        else:
            set_dynamic_rank_allocation(
                model, {p: 1.0 for p in model.hybrid_adapter.sites}, min_rank=2, max_rank=2,
                verbose=False,
            )  # fmt: skip
        wanted = alone(model).model.layers[0].self_attn.k_proj(x)
        torch.testing.assert_close(layer.k_proj(x), wanted)


def test_inference_mode():
    """Its tensors count no changes, and its outputs are good for nothing outside."""
    model = adapted(llama(), **NO_CACHE).eval()
    layer, single = model.model.layers[0].self_attn, alone(model).model.layers[0].self_attn
    with torch.inference_mode():
        x = torch.randn(2, 3, 32)
        layer.q_proj(x)
        x.mul_(2)
        torch.testing.assert_close(layer.k_proj(x), single.k_proj(x))
    x = torch.randn(2, 3, 32)
    with torch.inference_mode():
        layer.q_proj(x)
    with torch.no_grad():
        assert not layer.k_proj(x).is_inference()


def test_a_sibling_that_is_merged_or_moved_aside_keeps_all_alone(calls):
    model = adapted(llama(), **NO_CACHE).eval()
    ids = tokens()
    with torch.no_grad():
        wanted = model(ids).logits
        calls.clear()
        model.merge_adapter()
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert not calls
        layer = model.model.layers[0].self_attn
        layer.k_proj.forward = layer.k_proj.forward  # as accelerate's hooks set it
        model(ids)
    assert len(calls) == 1  # of the other layer


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("sibling", ["query", "value"])
def test_a_sibling_whose_tensors_a_hook_makes_keeps_all_alone(sibling, name, calls):
    """The hook runs at the sibling's own call; what it left before is old by then."""
    names = ["query", "key", "value"]
    model = adapted(bert(), target_modules=names, apply_lora_to=names, **NO_CACHE)
    ids = tokens()
    layer = getattr(model.bert.encoder.layer[0].attention.self, sibling)
    prune.l1_unstructured(layer, name, 0.5)
    calls.clear()
    model(ids)
    assert len(calls) == 1  # of the other layer
    with torch.no_grad():
        getattr(layer, f"{name}_orig").mul_(3)
    torch.testing.assert_close(model(ids).logits, alone(model)(ids).logits, rtol=1e-4, atol=1e-5)
    assert not any(group.dissolved for group in all_groups(model))


def test_hooks_of_every_module_fire(calls):
    model = adapted(llama()).eval()
    seen = []
    layer = model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        hook = lambda module, args, y, name=name: seen.append(name) or y * 2  # noqa: E731
        getattr(layer, name).register_forward_hook(hook)
    other = alone(model)
    ids = tokens()
    actual = model(ids).logits
    assert seen == ["q_proj", "k_proj", "v_proj"] and calls
    torch.testing.assert_close(actual, other(ids).logits, rtol=1e-4, atol=1e-5)


def test_masks_of_its_own_for_each_module_are_not_joined(calls):
    model = adapted(llama(), dropout_mask_sharing="module", **DROPOUT)
    ids = tokens()
    trained(model, ids)
    assert not calls
    model.eval()(ids)
    assert calls


@pytest.mark.parametrize("make", [llama, gpt2, t5, bert], ids=lambda f: f.__name__)
def test_generation_and_encoders(make):
    options = {}
    if make is not llama:
        names = {"gpt2": ["c_attn"], "t5": ["q", "k", "v"], "bert": ["query", "key", "value"]}
        names = names[make.__name__]
        options = {"target_modules": names, "apply_lora_to": names}
    model = adapted(make(), **NO_CACHE, **options).eval()
    other, ids = alone(model), tokens()
    if make is bert:
        torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-5)
    else:
        settings = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(ids, **settings), other.generate(ids, **settings))
    assert not any(group.dissolved for group in all_groups(model))


def test_copies_and_pickles_carry_no_output_in_flight():
    model = adapted(llama())
    layer = model.model.layers[0].self_attn
    layer.q_proj(torch.randn(1, 32, requires_grad=True))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        theirs = other.model.layers[0].self_attn
        group = theirs.q_proj.adapter.group
        assert group is theirs.v_proj.adapter.group and group is not layer.q_proj.adapter.group
        assert group.shelf.left is None and theirs.k_proj in group.modules
        ids = tokens()
        assert torch.equal(other(ids).logits, alone(other)(ids).logits)


def test_an_output_may_be_changed_in_place():
    model = adapted(llama())
    layer = model.model.layers[0].self_attn
    x = torch.randn(2, 3, 32, requires_grad=True)
    q, k = layer.q_proj(x).mul_(2), layer.k_proj(x)
    (q.sum() + k.sum()).backward()
    single = alone(model).model.layers[0].self_attn
    (wanted,) = torch.autograd.grad((single.q_proj(x) * 2).sum() + single.k_proj(x).sum(), x)
    torch.testing.assert_close(x.grad, wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_graph(checkpointing):
    torch._dynamo.reset()
    model, ids = adapted(llama(), adapter_dropout=0.0).train(), tokens()
    wanted = trained(model, ids)
    if checkpointing:
        enable_checkpointing(model, use_reentrant=False)
        model.enable_input_require_grads()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not checkpointing)
    model.zero_grad()
    loss = compiled(input_ids=ids, labels=ids).loss
    loss.backward()
    got = {"loss": loss.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }
    assert_close(got, wanted)
    assert all(not g.dissolved and g.shelf.left is None for g in all_groups(model))
    torch._dynamo.reset()
