"""`init: svd`: reading directions from the weights that the adapter sits on."""

import torch
from torch import nn

from .layers.bank import AdapterBank
from .layers.linear import dense_weight_of


@torch.no_grad()
def start_from_weights(model: nn.Module, bank: AdapterBank) -> None:
    """Let A and down read along the leading singular directions of the base's weights, in place.

    A's rows [rank, in] are the right singular vectors of W [out, in] with the largest singular
    values; down's rows [width, out], which read the layer's output, the left ones. A tensor that
    several layers share takes those of all their weights: the eigenvectors of Σ WᵀW or Σ WWᵀ.
    Rows are orthonormal. Rows beyond the number of directions, and bottlenecks behind a whole
    block, stay as they were drawn. B and up stay zero: unlike PiSSA (arXiv 2404.02948), the model
    computes what it did, and no weight of the base changes.
    """
    grams: dict[tuple[str, str], torch.Tensor] = {}
    for path, site in bank.sites.items():
        if site.spec.kind == "block":
            continue
        weight = dense_weight_of(model.get_submodule(path)).float()
        role = "lora_a" if site.spec.kind == "lora" else "down"
        gram = weight.mT @ weight if role == "lora_a" else weight @ weight.mT
        key = role, site.layout[role][0]
        grams[key] = grams[key] + gram if key in grams else gram
    for (role, key), gram in grams.items():
        rows = getattr(bank, role)[key]
        leading = torch.linalg.eigh(gram).eigenvectors.flip(1).mT[: len(rows)]
        rows[: len(leading)] = leading.to(rows)
