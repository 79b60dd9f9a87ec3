"""Tokens for tiny models, in batches and one by one, and the gradients they give a weight."""

import torch
from torch.utils.data import Dataset
from transformers.pytorch_utils import Conv1D

from tests.artemis.models import tokens


def batches(count: int = 3, labels: int | None = None) -> list[dict[str, torch.Tensor]]:
    """Batches of token ids; labels are the tokens, or classes."""
    found = []
    for _ in range(count):
        ids = tokens(4)
        target = ids if labels is None else torch.randint(labels, (4,))
        found.append({"input_ids": ids, "labels": target})
    return found


class Examples(Dataset):
    """A map-style dataset of single examples, sorted by nothing."""

    def __init__(self, count: int = 24):
        self.ids = tokens(count)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def weight_gradients(model, data, path: str) -> torch.Tensor:
    """[batches, out, in]: what autograd gives the very weight of one layer."""
    module = model.get_submodule(path)
    module.weight.requires_grad_(True)
    found = [torch.autograd.grad(model(**batch).loss, module.weight)[0] for batch in data]
    module.weight.requires_grad_(False)
    stacked = torch.stack(found)
    return stacked.mT if isinstance(module, Conv1D) else stacked
