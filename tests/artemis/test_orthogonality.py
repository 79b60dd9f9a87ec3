"""The penalty against loops over pairs, its gradient, and what it leaves alone."""

import pytest
import torch

from artemis import AdapterError, orthogonality_penalty, quantize_adapter_model
from tests.artemis.models import adapted, gradients, llama


def pairwise(vectors: torch.Tensor) -> float:
    """Mean squared cosine over all ordered pairs of different non-zero rows, one by one."""
    rows = [row for row in vectors.double() if row.any()]
    cosines = [
        (torch.dot(a, b) / a.norm() / b.norm()).item() ** 2
        for i, a in enumerate(rows)
        for j, b in enumerate(rows)
        if i != j
    ]
    return sum(cosines) / len(cosines) if cosines else 0.0


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize("shared", [True, False])
def test_cosine_equals_a_loop_over_pairs(shared):
    model = adapted(llama(), shared_parameters=shared)
    bank = model.hybrid_adapter
    with torch.no_grad():
        next(iter(bank.lora_b.values()))[:, 1] = 0
    expected = mean(map(pairwise, bank.lora_a.values()))
    expected += mean(pairwise(b.T) for b in bank.lora_b.values())
    assert orthogonality_penalty(model).item() == pytest.approx(expected, rel=1e-5)


def test_frobenius_is_the_literal_form():
    model = adapted(llama(), orthogonality_form="frobenius")
    bank, eye = model.hybrid_adapter, torch.eye(4)
    expected = mean(((a @ a.T - eye) ** 2).sum().item() for a in bank.lora_a.values())
    expected += mean(((b.T @ b - eye) ** 2).sum().item() for b in bank.lora_b.values())
    assert orthogonality_penalty(model).item() == pytest.approx(expected, rel=1e-5)


def test_a_fresh_adapter_has_finite_gradients_and_none_on_a_zero_b():
    model = adapted(llama(), fill=False)
    penalty = orthogonality_penalty(model)
    assert penalty.shape == () and penalty.dtype == torch.float32 and penalty > 0
    penalty.backward()
    for name, gradient in gradients(model).items():
        assert gradient.isfinite().all(), name
        assert gradient.any() == name.startswith("hybrid_adapter.lora_a."), name


def test_one_zero_column_has_finite_gradients():
    model = adapted(llama())
    b = next(iter(model.hybrid_adapter.lora_b.values()))
    with torch.no_grad():
        b[:, 2] = 0
    orthogonality_penalty(model).backward()
    assert b.grad.isfinite().all() and not b.grad[:, 2].any() and b.grad[:, 0].any()


def test_orthogonal_rows_cost_nothing_whatever_their_length():
    model = adapted(llama(), fill=False, init="orthogonal")
    assert orthogonality_penalty(model).item() < 1e-10


def test_lengths_do_not_count():
    model = adapted(llama())
    before = orthogonality_penalty(model).item()
    with torch.no_grad():
        for a in model.hybrid_adapter.lora_a.values():
            a.mul_(torch.tensor([0.01, 1.0, 5.0, 300.0]).unsqueeze(1))
    assert orthogonality_penalty(model).item() == pytest.approx(before, rel=1e-4)


def test_descending_it_makes_directions_orthogonal():
    model = adapted(llama())
    parameters = [*model.hybrid_adapter.lora_a.values(), *model.hybrid_adapter.lora_b.values()]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    start = orthogonality_penalty(model).item()
    for _ in range(60):
        optimizer.zero_grad()
        orthogonality_penalty(model).backward()
        optimizer.step()
    assert orthogonality_penalty(model).item() < 0.02 * start


def test_rank_one_and_no_lora_cost_nothing():
    assert orthogonality_penalty(adapted(llama(), lora_rank=1)).item() == 0.0
    model = adapted(llama(), target_modules=["up_proj"], apply_lora_to=[])
    assert orthogonality_penalty(model).item() == 0.0


@pytest.mark.parametrize("targets", [["q_proj"], ["up_proj"]])
def test_an_adapter_in_8_bits_that_has_no_parameters(targets):
    lora = [name for name in targets if name == "q_proj"]
    model = adapted(
        llama(), target_modules=targets, apply_lora_to=lora, shared_parameters=False,
        adapter_bias=False,
    )  # fmt: skip
    expected = orthogonality_penalty(model).item()
    quantize_adapter_model(model, adapter_bits=8, progress=False)
    assert not list(model.hybrid_adapter.parameters())
    assert orthogonality_penalty(model).item() == pytest.approx(expected, abs=0.02)


def test_a_model_without_an_adapter_is_refused():
    with pytest.raises(AdapterError, match="LlamaForCausalLM has no hybrid adapter"):
        orthogonality_penalty(llama())
