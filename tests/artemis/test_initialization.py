"""`init: svd` against numpy's singular value decomposition of the base's weights."""

import copy

import numpy
import pytest
import torch

from artemis import load_hybrid_adapter, quantize_adapter_model
from tests.artemis.models import adapted, gpt2, llama, tokens


def _weight(model, path: str) -> numpy.ndarray:
    """The weight [out, in]; GPT-2's layers hold it the other way round."""
    module = model.get_submodule(path)
    weight = module.weight.detach().double().numpy()
    return weight.T if hasattr(module, "nf") else weight


def _overlap(rows: torch.Tensor, directions: numpy.ndarray) -> float:
    """How much of the span of `rows` lies in the span of `directions`: 1, all of it."""
    inside = rows.detach().double().numpy() @ directions.T
    return (inside**2).sum() / len(rows)


GPT2 = {"target_modules": ["attn.c_attn", "mlp.c_fc"], "apply_lora_to": ["attn.c_attn"]}


@pytest.mark.parametrize(("make", "targets"), [(llama, {}), (gpt2, GPT2)])
@pytest.mark.parametrize("shared", [False, True])
def test_rows_are_the_leading_singular_directions(make, targets, shared):
    model = adapted(make(), fill=False, init="svd", shared_parameters=shared, **targets)
    bank, stacked = model.hybrid_adapter, {}
    for path, site in bank.sites.items():
        role = "lora_a" if site.spec.kind == "lora" else "down"
        weight = _weight(model, path) if role == "lora_a" else _weight(model, path).T
        stacked.setdefault((role, site.layout[role][0]), []).append(weight)
    for (role, key), weights in stacked.items():
        rows = getattr(bank, role)[key]
        directions = numpy.linalg.svd(numpy.concatenate(weights))[2]
        count = min(len(rows), len(directions))
        assert _overlap(rows[:count], directions[:count]) == pytest.approx(1, abs=1e-4)
        gram = rows[:count] @ rows[:count].T
        torch.testing.assert_close(gram, torch.eye(count), atol=1e-5, rtol=0)


def test_the_model_computes_what_it_did_and_the_file_brings_it_back(tmp_path):
    base, ids = llama(), tokens()
    again = copy.deepcopy(base)
    with torch.no_grad():
        expected = base(ids).logits
        model = adapted(base, fill=False, init="svd").eval()
        torch.testing.assert_close(model(ids).logits, expected)
    model.save_adapter_parameters(tmp_path)
    loaded = load_hybrid_adapter(again, tmp_path)
    for name, value in model.hybrid_adapter.lora_a.items():
        assert torch.equal(loaded.hybrid_adapter.lora_a[name], value)


def test_it_reads_packed_weights():
    base = llama()
    packed = quantize_adapter_model(copy.deepcopy(base), progress=False)
    exact = adapted(base, fill=False, init="svd").hybrid_adapter
    found = adapted(packed, fill=False, init="svd").hybrid_adapter
    for key, rows in found.lora_a.items():
        assert _overlap(rows, exact.lora_a[key].detach().double().numpy()) > 0.9
