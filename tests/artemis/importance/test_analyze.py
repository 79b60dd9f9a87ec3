"""Importance: scores against direct formulas, sources of data, and that nothing is left behind."""

import copy
import random
from typing import NamedTuple

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from artemis import (
    AdapterError,
    HybridAdapterConfig,
    analyze_layer_importance,
    plot_importance,
    quantize_adapter_model,
)
from artemis.importance import METHODS
from artemis.importance import moments as moments_module
from artemis.importance.moments import Moments
from artemis.importance.readers import adapter_reader
from artemis.layers.bank import initial
from artemis.layers.linear import weight_of
from artemis.layers.packed_linear import packed_layers
from artemis.plan import SiteSpec
from artemis.plots import grid
from artemis_kernels import bottleneck_adapter
from artemis_kernels.core.activations import ACTIVATIONS
from tests.artemis.data import Examples, batches, weight_gradients
from tests.artemis.models import (
    adapted,
    assert_same_state,
    bert,
    fill_bank,
    gpt2,
    llama,
    snapshot,
    t5,
    tokens,
)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Examples()[i] for i in range(24))


def formula(method: str, weight: torch.Tensor, gradients: torch.Tensor) -> float:
    """The definitions in docs/importance.md, fp64."""
    g, w = gradients.double(), weight.double()
    mean = g.mean(0)
    if method == "sensitivity":
        return (w * mean).abs().sum().item()
    if method == "energy":
        return torch.linalg.svdvals(mean)[:8].norm().item()
    root = (mean**2 + g.var(0)).sqrt()
    return max(
        ((mean**2 - g.var(0) / len(g)) / root).sum().item(), 0.01 * (mean**2 / root).sum().item()
    )


@pytest.mark.parametrize("method", ["weight_snr", "sensitivity", "energy"])
@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("filled", [False, True])
def test_scores_are_those_of_the_weights_gradients(method, build, filled):
    names = {} if build is llama else dict(
        target_modules=["attn.c_attn", "mlp.c_fc"], apply_lora_to=["attn.c_attn"]
    )  # fmt: skip
    # The reference path differentiates the base's weight too.
    config = HybridAdapterConfig(impl="reference", lora_rank=4, adapter_size=8, **names)
    model, data = adapted(build(), fill=filled, **config.to_dict()), batches()
    scores = analyze_layer_importance(model, data, method=method)
    lora = [p for p, site in model.hybrid_adapter.sites.items() if site.spec.kind == "lora"]
    expected = {}
    for path in lora:
        weight = weight_of(model.get_submodule(path)).detach()
        expected[path] = formula(method, weight, weight_gradients(model, data, path))
    ratio = [scores[path] / expected[path] for path in lora]
    assert max(ratio) == pytest.approx(min(ratio), rel=1e-3)
    assert sum(scores.values()) == pytest.approx(1)
    assert all(score >= 0 for score in scores.values())


@pytest.mark.parametrize(
    "settings", [{}, dict(adapter_scale=3.0), dict(scaling_factor=0.25), dict(adapter_bias=False)]
)
def test_the_default_scores_what_a_fresh_adapter_would_learn(settings):
    """The gradients of B and of up (with its bias) in a fresh hybrid, by autograd."""
    model, data = adapted(llama(), fill=False, shared_parameters=False, **settings), batches(4)
    bank, biased = model.hybrid_adapter, settings.get("adapter_bias", True)
    with torch.random.fork_rng():  # A and down as the analysis draws them
        torch.manual_seed(0)
        for site in bank.sites.values():
            role = "lora_a" if site.spec.kind == "lora" else "down"
            tensor = getattr(bank, role)[site.spec.own_key]
            if role == "down":
                tensor.data = torch.nn.init.normal_(torch.zeros_like(tensor), std=0.02)
            else:
                tensor.data = torch.nn.init.kaiming_uniform_(torch.zeros_like(tensor), a=5**0.5)
    scores = analyze_layer_importance(model, data)
    expected = {}
    for path, site in bank.sites.items():
        roles = ["lora_b"] if site.spec.kind == "lora" else ["up", "bias_up"][: 1 + biased]
        own = [getattr(bank, role)[site.spec.own_key] for role in roles]
        grads = [torch.autograd.grad(model(**batch).loss, own) for batch in data]
        flat = torch.stack([torch.cat([g.flatten() for g in some]) for some in grads])
        expected[path] = formula("snr", flat[0], flat)
    total = sum(expected.values())
    for path, score in scores.items():
        assert score == pytest.approx(expected[path] / total, rel=1e-3), path


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_a_bottleneck_would_learn_from_is_what_its_units_give(activation):
    """The operation itself, its second matrix the identity, where activations curve."""
    config = HybridAdapterConfig(
        adapter_size=16, adapter_scale=0.5, activation=activation, adapter_bias=False
    )
    spec = SiteSpec("layer", "bottleneck", "layer", 8, 16, 16)
    torch.manual_seed(0)
    reader, features = adapter_reader(spec, config, torch.device("cpu"))
    torch.manual_seed(0)
    down, y = initial("down", (16, 16), config.init), 40 * torch.randn(32, 16)
    expected = bottleneck_adapter(
        y, down, torch.eye(features), residual=torch.zeros_like(y), scale=0.5,
        activation=activation, impl="reference",
    )  # fmt: skip
    torch.testing.assert_close(reader(torch.empty(32, 8), y), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["snr", "weight_snr"])
def test_a_model_may_change_what_a_layer_gave_it_in_place(method):
    model, data, scores = llama(), batches(), []
    config = HybridAdapterConfig(target_modules=["gate_proj", "up_proj"], apply_lora_to=["up_proj"])
    for in_place in (False, True):
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.SiLU(in_place)
        scores.append(analyze_layer_importance(model, data, method=method, config=config))
    assert scores[0] == scores[1]


def test_a_planted_change_is_found():
    """The targets come from a copy in which one layer's weight differs."""
    torch.manual_seed(0)
    model = llama(num_hidden_layers=3, initializer_range=0.15)
    path = "model.layers.1.self_attn.o_proj"
    data = [{"input_ids": tokens(16)} for _ in range(6)]

    weight = model.get_submodule(path).weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.add_(torch.randn_like(weight) * kept.std())
        for batch in data:
            batch["wanted"] = model(input_ids=batch["input_ids"]).logits.softmax(-1)
        weight.copy_(kept)

    def distance(model, batch):
        predicted = model(input_ids=batch["input_ids"]).logits.log_softmax(-1)
        return torch.nn.functional.kl_div(predicted, batch["wanted"], reduction="batchmean")

    found = analyze_layer_importance(model, data, method="weight_snr", loss=distance)
    same = {p: score for p, score in found.items() if p.endswith("o_proj")}
    assert max(same, key=same.get) == path


@pytest.mark.parametrize("method", METHODS)
def test_everything_is_left_as_it_was(method):
    model = adapted(bert(), target_modules=["query", "output.dense"], apply_lora_to=["query"])
    model.train()
    model.bert.embeddings.eval()
    for parameter in model.hybrid_adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = snapshot(model)
    modes = {name: module.training for name, module in model.named_modules()}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    loader = DataLoader(Examples(), batch_size=4, shuffle=True)  # draws from torch's generator
    generators = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()

    def classified(model, batch):
        random.random()
        numpy.random.rand()
        return model(input_ids=batch["input_ids"], labels=batch["labels"][:, 0] % 3).loss

    analyze_layer_importance(model, loader, method=method, loss=classified)
    with pytest.raises(KeyboardInterrupt):
        analyze_layer_importance(model, loader, method=method, loss=interrupted(classified))
    assert_same_state(model, state)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert required == {name: p.requires_grad for name, p in model.named_parameters()}
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert numpy.array_equal(numpy.random.get_state()[1], generators[2])
    for module in model.modules():
        assert not module._forward_hooks and not module._backward_hooks
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("hybrid_adapter."), name
        assert parameter.grad is None or (parameter.grad == 1).all()


def interrupted(loss):
    def run(model, batch):
        run.calls += 1
        if run.calls == 2:
            raise KeyboardInterrupt
        return loss(model, batch)

    run.calls = 0
    return run


@pytest.mark.parametrize("method", METHODS)
def test_same_data_same_scores(method):
    model = adapted(llama(attention_dropout=0.5))
    examples = Examples()
    first = analyze_layer_importance(model, examples, method=method, batches=3)
    torch.rand(5)
    model.train()
    assert analyze_layer_importance(model, examples, method=method, batches=3) == first


def test_before_and_after_injection():
    """A base gives the scores that its fresh hybrid gives, and is not adapted by that."""
    model, data = llama(), batches()
    config = HybridAdapterConfig(lora_rank=4, adapter_size=8)
    before = analyze_layer_importance(model, data, config=config)
    assert not hasattr(model, "hybrid_adapter")
    after = analyze_layer_importance(adapted(model, fill=False), data)
    assert before.keys() == after.keys()
    assert list(before.values()) == pytest.approx(list(after.values()), rel=1e-4)


def test_sources_of_data():
    model, examples = adapted(llama()), Examples(24)
    given = batches(3)
    reference = analyze_layer_importance(model, given)
    assert analyze_layer_importance(model, tuple(given)) == reference
    assert analyze_layer_importance(model, iter(given)) == reference
    assert analyze_layer_importance(model, given + batches(5), batches=3) == reference
    loader = DataLoader(examples, batch_size=8)
    in_order = [
        {"input_ids": examples.ids[i : i + 8], "labels": examples.ids[i : i + 8]}
        for i in (0, 8, 16)
    ]
    assert analyze_layer_importance(model, loader) == analyze_layer_importance(model, in_order)
    assert analyze_layer_importance(model, Stream()).keys() == reference.keys()
    listed = [{name: t.tolist() for name, t in examples[i].items()} for i in range(24)]
    as_dataset = analyze_layer_importance(model, examples)
    for rows in (listed, tuple(examples[i] for i in range(24))):
        assert analyze_layer_importance(model, rows) == as_dataset
    few = analyze_layer_importance(model, Examples(5))  # fewer examples than batches times size
    assert sum(few.values()) == pytest.approx(1)


def test_a_module_that_is_called_twice_counts_both_calls():
    moments = Moments(3, 2, torch.device("cpu"))
    pairs = [(torch.randn(5, 2), torch.randn(5, 3)) for _ in range(4)]
    for batch in (pairs[:2], pairs[2:]):
        for _ in batch:
            moments.expect()
        for u, dy in batch:
            moments.add(u, dy)
        moments.end_batch()
    whole = [sum(dy.t() @ u for u, dy in batch) for batch in (pairs[:2], pairs[2:])]
    torch.testing.assert_close(moments.mean, sum(whole) / 2)
    torch.testing.assert_close(moments.variance, torch.stack(whole).var(0))


def test_blocks_encoder_decoders_and_tied_layers():
    model = adapted(llama(), target_modules=["q_proj", "mlp"], apply_lora_to=["q_proj"])
    for method in METHODS:
        scores = analyze_layer_importance(model, batches(), method=method)
        assert set(scores) == set(model.hybrid_adapter.sites)
        assert min(scores.values()) > 0
    other = adapted(t5(), target_modules=["q", "k", "v", "wo"], apply_lora_to=["q", "k", "v"])
    assert min(analyze_layer_importance(other, batches()).values()) > 0


def test_large_gradients_are_sampled(monkeypatch):
    """Half of the rows and columns give nearly the score of all of them."""
    model, data = llama(hidden_size=64, intermediate_size=128), batches(4)
    whole = analyze_layer_importance(model, data, method="sensitivity")
    monkeypatch.setattr(moments_module, "SIDE", 32)
    part = analyze_layer_importance(model, data, method="sensitivity")
    assert part != whole
    assert list(part.values()) == pytest.approx(list(whole.values()), rel=0.5)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_of_a_large_gradient_is_scaled_up(method, monkeypatch):
    """The same rows and columns of gradient and weight, and the formula of a part of them."""
    torch.manual_seed(0)
    data = [(torch.randn(9, 20), torch.randn(9, 14)) for _ in range(3)]
    weight = torch.randn(14, 20)
    monkeypatch.setattr(moments_module, "SIDE", 6)
    moments = Moments(14, 20, torch.device("cpu"))
    for u, dy in data:
        moments.expect()
        moments.add(u, dy)
        moments.end_batch()
    rows, columns = moments.rows.tolist(), moments.columns.tolist()
    assert len(set(rows)) == len(set(columns)) == 6 and rows != list(range(6))
    kept = torch.stack([dy.t() @ u for u, dy in data])[:, rows][:, :, columns]
    share = 14 * 20 / 36  # entries that each kept one stands for
    expected = formula(method.removeprefix("weight_"), weight[rows][:, columns], kept)
    expected *= share**0.5 if method == "energy" else share  # the root of a sum of squares
    assert METHODS[method].score(moments, weight) == pytest.approx(expected, rel=1e-4)


def test_a_classifier_and_bf16():
    model = adapted(bert().to(torch.bfloat16), target_modules=["query", "intermediate.dense"],
                    apply_lora_to=["query"])  # fmt: skip
    scores = analyze_layer_importance(model, batches(labels=3))
    assert len(scores) == 4 and sum(scores.values()) == pytest.approx(1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_quantized_base(method, build):
    """Scores as over the plain base that the packed numbers stand for."""
    names = {} if build is llama else dict(
        target_modules=["attn.c_attn", "mlp.c_fc"], apply_lora_to=["attn.c_attn"]
    )  # fmt: skip
    plain, data = build(), batches()
    packed = quantize_adapter_model(copy.deepcopy(plain), activation_bits=16, progress=False)
    with torch.no_grad():
        for path, module in packed_layers(packed):
            weight_of(plain.get_submodule(path)).copy_(module.weight.dequantize())
    config = HybridAdapterConfig(**names)
    wanted = analyze_layer_importance(plain, data, method=method, config=config)
    got = analyze_layer_importance(packed, data, method=method, config=config)
    assert got == pytest.approx(wanted, rel=1e-3)


class Outputs(NamedTuple):
    states: torch.Tensor
    other: int


def test_a_block_that_returns_a_named_tuple():
    model, seen = adapted(llama(), target_modules=["q_proj", "mlp"]), []
    for layer in model.model.layers:
        mlp = layer.mlp.forward
        layer.mlp.forward = lambda x, mlp=mlp: Outputs(mlp(x), 3)
        layer.mlp.register_forward_hook(lambda m, a, y: (seen.append(type(y)), y.states)[1])
    plain = adapted(llama(), target_modules=["q_proj", "mlp"])
    plain.load_state_dict(model.state_dict())
    data = batches()
    assert analyze_layer_importance(model, data) == analyze_layer_importance(plain, data)
    assert set(seen) == {Outputs}


def without_labels() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": tokens(4)}]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (batches, dict(method="magic"), "method: got 'magic', allowed: snr"),
        (batches, dict(batches=0), "batches: got 0"),
        (batches, dict(batch_size=True), "batch_size: got True"),
        (batches, dict(config=HybridAdapterConfig()), "leave config out"),
        (lambda: batches(1), {}, "got 1 batches, allowed: 2 or more"),
        (list, dict(method="energy"), "got 0 batches, allowed: 1 or more"),
        (without_labels, {}, "input_ids gives no loss"),
        (lambda: [tokens()], {}, "got a Tensor as a batch"),
        (lambda: batches()[0], {}, "dataset: got a dict"),
        (lambda: 7, {}, "dataset: got a int"),
        (lambda: tokens(), {}, "dataset: got a Tensor"),
        (batches, dict(loss=lambda m, b: torch.tensor(float("nan"))), "got nan"),
        (batches, dict(loss=lambda m, b: torch.ones(())), "depends on none of the modules"),
        (batches, dict(loss=lambda m, b: 3.0), "got 3.0, allowed: a finite 0-d tensor"),
    ],
)
def test_refusals(data, options, message):
    with pytest.raises(AdapterError, match=message):
        analyze_layer_importance(adapted(llama()), data(), **options)


def test_a_merged_adapter_is_refused():
    model = adapted(llama())
    model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        analyze_layer_importance(model, batches())


def test_a_trained_adapter_changes_the_scores():
    model, data = adapted(llama(), fill=False), batches()
    before = analyze_layer_importance(model, data)
    fill_bank(model)
    assert analyze_layer_importance(model, data) != before


def test_pictures(tmp_path):
    rows, columns, cells = grid({"m.layers.0.a.q": 1.0, "m.layers.1.a.q": 2.0, "m.layers.1.f": 3.0})
    assert (rows, columns) == (["m.layers.0", "m.layers.1"], ["a.q", "f"])
    assert cells == [[1.0, None], [2.0, 3.0]]
    pytest.importorskip("matplotlib")
    plot_importance({"layers.0.q": 0.4, "layers.1.q": 0.6}, tmp_path / "scores.svg")
    assert "<svg" in (tmp_path / "scores.svg").read_text()
    with pytest.raises(AdapterError, match="scores: got none"):
        plot_importance({}, tmp_path / "none.svg")


def test_pictures_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(AdapterError, match="need matplotlib: pip install matplotlib$"):
        plot_importance({"layers.0.q": 1.0}, tmp_path / "scores.svg")
