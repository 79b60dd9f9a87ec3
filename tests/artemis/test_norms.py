"""Running statistics of the frozen base: the same before, while and after an adapter trains."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

from artemis import load_hybrid_adapter
from tests.artemis.models import adapted, assert_same_state, snapshot


def conformer() -> nn.Module:
    """Its convolutions carry batch norms."""
    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=16,
        num_labels=3, conv_depthwise_kernel_size=5, apply_spec_augment=False, layerdrop=0.0,
    )  # fmt: skip
    return transformers.Wav2Vec2ConformerForSequenceClassification(config).eval()


CONFORMER = dict(target_modules=["linear_q", "output_dense"], apply_lora_to=["linear_q"])


class Norms(nn.Module):
    """A norm in the base, one that only its batch counts for, and one in the head."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.kept = nn.BatchNorm1d(6)
        self.instance = nn.InstanceNorm1d(6, track_running_stats=True)
        self.untracked = nn.BatchNorm1d(6, track_running_stats=False)
        self.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2))

    def forward(self, x):
        y = self.untracked(self.kept(self.linear(x)))
        return self.head(y + self.instance(y.T[None])[0].T if len(y) == 6 else y)


NORMS = dict(target_modules=["linear"], apply_lora_to=["linear"], modules_to_save=["head"])


def train(model: nn.Module, x: torch.Tensor, steps: int = 3) -> None:
    """A few steps of plain torch, in training mode."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    for _ in range(steps):
        model.train()
        output = model(x)
        getattr(output, "logits", output).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.eval()(x).logits


def test_training_leaves_the_base_as_it_was_and_a_reload_computes_the_same(tmp_path):
    torch.manual_seed(0)
    base, x = conformer(), 3 * torch.randn(4, 400)
    state, expected = snapshot(base), logits(base, x)
    model = adapted(copy.deepcopy(base), modules_to_save=[], **CONFORMER)
    train(model, x)
    trained = logits(model, x)
    assert not torch.equal(trained, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, x), expected)
    model.save_adapter_parameters(tmp_path)
    loaded = load_hybrid_adapter(copy.deepcopy(base), tmp_path, strict=True)
    assert torch.equal(logits(loaded, x), trained)
    train(loaded, x)
    loaded.remove_adapter()
    assert_same_state(loaded, state)


def test_norms_of_a_head_change_and_so_does_every_norm_after_removal():
    torch.manual_seed(0)
    model, x = Norms(), torch.randn(6, 6) + 2
    attributes = set(vars(model.kept))
    train(model, x)
    before = snapshot(model)
    adapted(model, **NORMS)
    assert model.training and not model.kept.training  # held before anybody calls train()
    train(model, x)
    now = snapshot(model)
    frozen = [n for n in before if "running" in n and not n.startswith("head")]
    assert len(frozen) == 4 and all(torch.equal(now[n], before[n]) for n in frozen)
    assert not torch.equal(now["head.0.running_mean"], before["head.0.running_mean"])
    assert model.untracked.training  # it has nothing that could change

    model.remove_adapter()
    assert set(vars(model.kept)) == attributes and model.kept.training
    train(model, x)
    assert not any(torch.equal(snapshot(model)[n], before[n]) for n in frozen)
    assert not model.eval().kept.training


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copys_norms_are_its_own(clone):
    model = adapted(Norms(), **NORMS)
    other = clone(model)
    model.remove_adapter()
    other.train()
    model.train()
    assert model.kept.training and not other.kept.training
    other.remove_adapter()
    assert other.kept.training
