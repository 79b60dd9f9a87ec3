"""`lora_rank: auto`: from the data of a task to a rank, and the scores to allocate it by."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .batches import batches_of
from .config import AUTO, HybridAdapterConfig
from .errors import AdapterError
from .importance import analyze_layer_importance
from .importance.analyze import Loss, gradient_moments
from .importance.gradients import own_generators
from .targets import make_plan

#: What of the energy that two halves of the data agree on the rank should carry.
SHARE = 0.9
#: Ranks that are chosen from; a module may get from half the rank to four times it.
LEAST, MOST = 4, 32
#: The rank at which modules are scored.
_SCORED = 8
_LEAST_BATCHES = 4


@dataclass(frozen=True)
class RankChoice:
    """What `choose_ranks` chose; printed, the reason.

    `config` is the configuration with `rank` as its `lora_rank`, for `add_hybrid_adapter_to_model`;
    `scores`, `min_rank` and `max_rank` are for `set_dynamic_rank_allocation`. `directions`: for
    each LoRA module how many directions carry `SHARE` of what halves of the data agree on.
    """

    config: HybridAdapterConfig
    rank: int
    min_rank: int
    max_rank: int
    scores: dict[str, float]
    directions: dict[str, int]
    batches: int

    @property
    def reason(self) -> str:
        """Why this rank, in one sentence."""
        fewest, most = min(self.directions.values()), max(self.directions.values())
        return (
            f"lora_rank: auto chose {self.rank}: of what the gradients of {self.batches} batches"
            f" agree on, {SHARE:.0%} lies in {fewest} to {most} directions a module, weighted by"
            f" importance {self._needed:.1f} (allowed: {LEAST} to {MOST}); modules get ranks from"
            f" {self.min_rank} to {self.max_rank} by importance, at the cost of {self.rank}"
            " everywhere"
        )

    @property
    def _needed(self) -> float:
        return _weighted(self.directions, self.scores)

    def __str__(self) -> str:
        return self.reason

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON holds them."""
        return {
            "rank": self.rank,
            "min_rank": self.min_rank,
            "max_rank": self.max_rank,
            "reason": self.reason,
            "scores": self.scores,
            "directions": self.directions,
        }


def choose_ranks(
    model: nn.Module,
    dataset: Iterable[Any],
    config: HybridAdapterConfig | None = None,
    *,
    batches: int = 16,
    batch_size: int = 8,
    collate: Callable[[list], Mapping[str, Any]] | None = None,
    loss: Loss | None = None,
) -> RankChoice:
    """Choose a LoRA rank and score the modules, from a task's data, before an adapter is added.

    The mean gradients of a module's weight over every other batch and over the rest are compared:
    the leading directions of one are judged by the energy that the other has along them, so that
    what is noise counts nothing (docs/importance.md). The rank is the mean of the numbers of
    directions needed, weighted by importance. The model is left as it was; the same data give the
    same choice.

    Args:
        model: a base without an adapter; a transformers model, or any module if `loss` is given.
        dataset, batch_size, collate, loss: as for `analyze_layer_importance`.
        config: the adapter to be; its `lora_rank` does not count. Default:
            `HybridAdapterConfig()`.
        batches: how many to use at most.

    Raises:
        AdapterError: no module would get LoRA, fewer than 4 batches, or what
            `analyze_layer_importance` refuses.
    """
    config = replace(config or HybridAdapterConfig(), lora_rank=_SCORED)
    with own_generators(next(model.parameters()).device):  # a DataLoader may shuffle
        seen = list(batches_of(dataset, batches, batch_size, collate))
    if len(seen) < _LEAST_BATCHES:
        raise AdapterError(
            f"dataset: got {len(seen)} batches, allowed: {_LEAST_BATCHES} or more to choose a rank"
        )
    options = {"batches": len(seen), "config": config, "loss": loss}
    scores = analyze_layer_importance(model, seen, **options)
    directions = _directions(model, seen, options)
    if not directions:
        raise AdapterError(f"lora_rank: got {AUTO!r}, allowed: an integer where nothing gets LoRA")
    rank = min(MOST, max(LEAST, round(_weighted(directions, scores))))
    return RankChoice(
        replace(config, lora_rank=rank), rank, max(1, rank // 2), 4 * rank,
        scores, directions, len(seen),
    )  # fmt: skip


def _directions(model: nn.Module, seen: list, options: dict[str, Any]) -> dict[str, int]:
    """LoRA module -> how many directions its update needs."""
    halves = [
        gradient_moments(model, half, method="energy", **options)
        for half in (seen[::2], seen[1::2])
    ]
    lora = [spec.path for spec in make_plan(model, options["config"]).sites if spec.kind == "lora"]
    return {path: directions_needed(*(half[path].mean for half in halves)) for path in lora}


@torch.no_grad()
def directions_needed(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many leading directions carry `SHARE` of what two estimates of a matrix agree on.

    The singular directions of each [out, in] estimate are weighed by `σᵢ · uᵢᵀ M vᵢ` with M the
    other one: errors that are independent cancel there. All together are the product of the two
    estimates, what they agree on; where that is not above 0 the answer is 1.
    """
    energy = (_energy(one, other) + _energy(other, one)).cumsum(0)
    reached = energy >= SHARE * energy[-1]
    return int(reached.nonzero()[0]) + 1 if energy[-1] > 0 else 1


def _energy(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    u, sigma, vh = torch.linalg.svd(one.float(), full_matrices=False)
    return sigma * ((u.mT @ other.float()) * vh).sum(1)


def _weighted(directions: Mapping[str, int], scores: Mapping[str, float]) -> float:
    """The mean number of directions, by the scores of the modules."""
    weight = sum(scores[path] for path in directions)
    if not weight > 0:
        return sum(directions.values()) / len(directions)
    return sum(scores[path] * number for path, number in directions.items()) / weight
