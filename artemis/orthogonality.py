"""The orthogonality penalty: LoRA's directions should not repeat one another."""

import torch
from torch import nn

from .errors import AdapterError
from .layers.bank import find_bank


def orthogonality_penalty(model: nn.Module) -> torch.Tensor:
    """Return the penalty of `model`'s LoRA matrices: 0-d, fp32, differentiable.

    The mean over all A, each by its rows, plus the mean over all B, each by its columns; a shared
    tensor counts once. "cosine": the mean squared cosine between different directions, those that
    are zero left out (so it neither moves a fresh B nor depends on lengths). "frobenius":
    ‖AAᵀ − I‖² and ‖BᵀB − I‖², as in AdaLoRA (arXiv 2303.10512, eq. 4), which also pulls lengths,
    a zero B's included, towards one. It is not weighted by `orthogonality_weight`.

    Raises `AdapterError` where there is no adapter.
    """
    bank = find_bank(model)
    if bank is None:
        raise AdapterError(f"{type(model).__name__} has no hybrid adapter to take a penalty of")
    term = _TERMS[bank.config.orthogonality_form]
    sides = (list(bank.lora_a.values()), [b.t() for b in bank.lora_b.values()])
    means = [torch.stack([term(m.float()) for m in side]).mean() for side in sides if side]
    return sum(means, torch.zeros((), device=bank.device))


def _squared_cosines(vectors: torch.Tensor) -> torch.Tensor:
    """Mean squared cosine between different rows of [n, d], zero rows left out."""
    squares = vectors.square().sum(1)
    present = squares > 0
    # The root's derivative is infinite at 0: zero rows stay out of it, not only out of the sum.
    unit = vectors * torch.where(present, squares, 1).rsqrt().unsqueeze(1)
    products = (unit @ unit.t()).square()
    count = present.sum()
    return (products.sum() - products.diagonal().sum()) / (count * (count - 1)).clamp(min=1)


def _distance_from_identity(vectors: torch.Tensor) -> torch.Tensor:
    """‖V Vᵀ − I‖² for V [n, d]."""
    gram = vectors @ vectors.t()
    return (gram - torch.eye(gram.shape[0], device=gram.device)).square().sum()


_TERMS = {"cosine": _squared_cosines, "frobenius": _distance_from_identity}
