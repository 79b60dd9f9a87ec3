"""`lora_rank: auto`: directions against a planted truth and numpy, and what is done with them."""

import numpy
import pytest
import torch
from torch.utils.data import DataLoader

from artemis import (
    AdapterError,
    HybridAdapterConfig,
    add_hybrid_adapter_to_model,
    choose_ranks,
    set_dynamic_rank_allocation,
)
from artemis.automatic import SHARE, directions_needed
from tests.artemis.models import assert_same_state, gpt2, llama, snapshot, tokens

from .data import Examples, batches, weight_gradients


def planted(rank: int, noise: float, size: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Two estimates, with errors of their own, of a matrix with `rank` equal singular values."""
    u, v = (torch.linalg.qr(torch.randn(size, rank))[0] for _ in range(2))
    signal = u @ v.mT
    return tuple(signal + noise * torch.randn(size, size) / size**0.5 for _ in range(2))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_planted_directions_are_counted_and_noise_is_not(rank):
    torch.manual_seed(rank)
    one, other = planted(rank, noise=0.2)
    energy = torch.linalg.svdvals(one).square().cumsum(0)
    by_spectrum = int((energy < SHARE * energy[-1]).sum()) + 1
    assert directions_needed(one, other) == rank < by_spectrum / 1.5
    assert directions_needed(one, other) == directions_needed(other, one)


def test_estimates_that_contradict_each_other_need_one():
    one, _ = planted(3, noise=0.0)
    assert directions_needed(one, -one) == 1


def test_directions_are_those_of_the_gradients_of_the_weights():
    torch.manual_seed(0)
    model, data = llama(), batches(6)
    choice = choose_ranks(model, data)
    path = "model.layers.1.self_attn.v_proj"
    gradients = weight_gradients(model, data, path).double().numpy()
    halves = gradients[::2].mean(0), gradients[1::2].mean(0)
    energy = 0
    for one, other in (halves, halves[::-1]):
        u, sigma, vh = numpy.linalg.svd(one, full_matrices=False)
        energy = energy + sigma * numpy.einsum("ok,oi,ki->k", u, other, vh)
    total = numpy.cumsum(energy)
    assert choice.directions[path] == numpy.argmax(total >= SHARE * total[-1]) + 1
    assert all("self_attn" in path for path in choice.directions)


def test_the_rank_is_the_mean_by_importance_within_bounds():
    torch.manual_seed(0)
    choice = choose_ranks(llama(hidden_size=64), batches(6))
    weight = sum(choice.scores[path] for path in choice.directions)
    mean = sum(choice.scores[p] * n for p, n in choice.directions.items()) / weight
    assert choice.rank == max(4, min(32, round(mean)))
    assert (choice.min_rank, choice.max_rank) == (choice.rank // 2, 4 * choice.rank)
    assert sum(choice.scores.values()) == pytest.approx(1)
    assert f"chose {choice.rank}" in choice.reason and f"{mean:.1f}" in choice.reason


def test_the_model_and_the_generators_are_left_alone_and_the_choice_repeats():
    torch.manual_seed(0)
    model, data = gpt2(), batches(4)
    config = HybridAdapterConfig(
        target_modules=["attn.c_attn", "mlp.c_fc"], apply_lora_to=["attn.c_attn"], lora_rank="auto"
    )
    before, state = snapshot(model), torch.get_rng_state()
    first, second = (choose_ranks(model, data, config) for _ in range(2))
    assert first == second and torch.equal(torch.get_rng_state(), state)
    assert_same_state(model, before)
    assert config.lora_rank == "auto" and isinstance(first.config.lora_rank, int)


def test_a_loader_that_shuffles_gives_the_same_choice_again():
    torch.manual_seed(0)
    model, loader = llama(), DataLoader(Examples(32), batch_size=4, shuffle=True)
    state = torch.get_rng_state()
    first = choose_ranks(model, loader)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert choose_ranks(model, loader) == first


def test_three_calls_from_data_to_an_allocation():
    torch.manual_seed(0)
    model, ids = llama(), tokens()
    choice = choose_ranks(model, batches(4), HybridAdapterConfig(lora_rank="auto", adapter_size=8))
    expected = model(ids).logits
    add_hybrid_adapter_to_model(model, choice.config)
    report = set_dynamic_rank_allocation(
        model, choice.scores, choice.min_rank, choice.max_rank, verbose=False
    )
    lora = [m.after for m in report.modules if m.kind == "lora"]
    assert all(choice.min_rank <= rank <= choice.max_rank for rank in lora)
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize(
    ("count", "settings", "message"),
    [
        (3, {}, "dataset: got 3 batches, allowed: 4 or more to choose a rank"),
        (4, {"apply_lora_to": []}, "allowed: an integer where nothing gets LoRA"),
    ],
)
def test_refusals(count, settings, message):
    with pytest.raises(AdapterError, match=message):
        choose_ranks(llama(), batches(count), HybridAdapterConfig(**settings))


def test_auto_without_data_is_one_error_before_anything_changes():
    model = llama()
    before = snapshot(model)
    with pytest.raises(AdapterError, match="lora_rank: got 'auto', allowed: an integer; choose_r"):
        add_hybrid_adapter_to_model(model, HybridAdapterConfig(lora_rank="auto"))
    assert_same_state(model, before)
    with pytest.raises(AdapterError, match="allowed: an integer from 1, or auto"):
        HybridAdapterConfig(lora_rank="automatic")
