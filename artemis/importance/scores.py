"""From the moments of a target's gradient to one number: how much training it would help.

`docs/importance.md` has the maths, the sources and the evidence.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .moments import Moments
from .readers import Reading, adapter_reader, weight_reader

#: Rank of the update whose energy `energy` counts.
RANK = 8
#: What is left of a score that consists of nothing but noise.
FLOOR = 0.01


def sensitivity(moments: Moments, weight: torch.Tensor | None) -> float:
    """`Σ |W ∘ μ|`, μ the mean gradient; a block's weight is the identity of its residual."""
    if weight is None:
        weight = torch.eye(moments.outputs, moments.inputs, device=moments.device)
    return (moments.kept(weight).float() * moments.mean).abs().sum().item() * moments.share


def energy(moments: Moments, weight: torch.Tensor | None) -> float:
    """`√ Σ_{k ≤ RANK} σ_k(μ)²`: the part of the mean gradient that a low rank can follow."""
    values = torch.linalg.svdvals(moments.mean)[:RANK]
    return (values.square().sum() * moments.share).sqrt().item()


def signal(moments: Moments, weight: torch.Tensor | None) -> float:
    """`Σ (μ² − s²/n) / √(μ² + s²)`: the loss's fall, to first order, in a step of Adam.

    μ is an entry's mean over n batches, s its scatter. Adam moves the entry by μ over the root of
    its mean square, so what differs from batch to batch counts less; and μ² itself is too large by
    s²/n, which is taken off. A module whose signal drowns keeps `FLOOR` of the sum without that.
    """
    mean, variance = moments.mean, moments.variance
    squared = mean.square()
    root = (squared + variance).sqrt().clamp(min=torch.finfo(mean.dtype).tiny)
    biased = (squared / root).sum().item()
    unbiased = ((squared - variance / moments.batches) / root).sum().item()
    return max(unbiased, FLOOR * biased) * moments.share


@dataclass(frozen=True)
class Method:
    """A score, the gradient that it is made of, and what it needs beside that."""

    score: Callable[[Moments, torch.Tensor | None], float]
    reading: Reading
    least: int = 1  # batches
    weight: bool = False


METHODS: dict[str, Method] = {
    "snr": Method(signal, adapter_reader, 2),
    "weight_snr": Method(signal, weight_reader, 2),
    "sensitivity": Method(sensitivity, weight_reader, weight=True),
    "energy": Method(energy, weight_reader),
}
