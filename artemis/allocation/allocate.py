"""`set_dynamic_rank_allocation`: ranks and widths where the scores are."""

from collections.abc import Mapping

import torch
from torch import nn

from ..config import HybridAdapterConfig
from ..errors import AdapterError, listed
from ..layers.bank import AdapterBank, find_bank
from ..merging import check_unmerged
from ..plan import SiteSpec
from ..schema import check_integer, is_integer, is_number
from .apportion import Claim, apportion, apportion_by_kind
from .report import ModuleAllocation, RankAllocation
from .resize import resize

Bounds = dict[str, tuple[int, int]]


def set_dynamic_rank_allocation(
    model: nn.Module,
    scores: Mapping[str, float],
    min_rank: int = 4,
    max_rank: int = 32,
    *,
    min_width: int | None = None,
    max_width: int | None = None,
    budget: int | None = None,
    within: str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    verbose: bool = True,
) -> RankAllocation:
    """Give each adapted module a rank or width in proportion to its score; change it in place.

    Growing keeps what the model computes; shrinking drops what matters least and reports the error.
    (Where bottlenecks are shared, one that grows over units that others trained takes them as they
    are; that is reported too.) Parameters stay the same objects, their gradients are dropped.

    Args:
        model: a model with a hybrid adapter, not merged; before or after training.
        scores: module path -> score from 0, for every adapted module, as
            `analyze_layer_importance` returns them.
        min_rank, max_rank: bounds of LoRA ranks.
        min_width, max_width: bounds of bottleneck widths; default: the rank bounds times
            `adapter_size / lora_rank`.
        budget: parameters to spend on units, counted as if nothing were shared; default: what the
            configuration's `lora_rank` and `adapter_size` would cost everywhere. It is met to
            within one unit; the bounds win over the default, and an explicit budget outside them
            is an error.
        within: "kind": scores count only among modules of their kind; LoRA and bottlenecks each
            spend their share of what the uniform configuration costs, but where all modules of one
            are at a bound; None: among all.
        optimizer: one that trains the adapter; its state follows.
        verbose: print the returned report.

    Raises:
        AdapterError: before anything has changed.
    """
    bank = _checked_bank(model)
    bounds = _bounds(bank.config, min_rank, max_rank, min_width, max_width)
    specs = bank.plan().sites
    _check_scores(scores, specs)
    claims = [_claim(spec, bank.config, float(scores[spec.path]), bounds) for spec in specs]
    given = _budget(budget, claims)
    sizes = _given_out(specs, claims, given, within)
    stored_before = _stored(bank)
    errors = resize(bank, sizes, optimizer)
    modules = tuple(
        _allocation(spec, claim, sizes[spec.path], errors[spec.path])
        for spec, claim in zip(specs, claims, strict=True)
    )
    cost = sum(module.cost for module in modules)
    report = RankAllocation(
        modules, given, cost, stored_before, _stored(bank), _note(given, cost, claims)
    )
    if verbose:
        print(report)
    return report


def _given_out(
    specs: tuple[SiteSpec, ...], claims: list[Claim], budget: int, within: str | None
) -> dict[str, int]:
    """Module path -> size."""
    if within not in ("kind", None):
        raise AdapterError(f"within: got {within!r}, allowed: 'kind' or None")
    if within is None:
        sizes = apportion(claims, budget)
    else:
        sizes = apportion_by_kind([spec.kind for spec in specs], claims, budget)
    return dict(zip((spec.path for spec in specs), sizes, strict=True))


def _allocation(spec: SiteSpec, claim: Claim, size: int, error: float) -> ModuleAllocation:
    """What is told of a module; `spec` is as it was before."""
    return ModuleAllocation(
        spec.path, spec.kind, claim.score, spec.size, size, claim.cost * size, error
    )


def unit_cost(spec: SiteSpec, config: HybridAdapterConfig) -> int:
    """Parameters of one rank or one unit of a module, as if it shared none."""
    if spec.kind == "lora":
        return spec.in_features + spec.out_features
    return 2 * spec.out_features + config.adapter_bias


def usual_size(spec: SiteSpec, config: HybridAdapterConfig) -> int:
    """The rank or width that the configuration gives every module."""
    return config.lora_rank if spec.kind == "lora" else config.adapter_size


def _claim(spec: SiteSpec, config: HybridAdapterConfig, score: float, bounds: Bounds) -> Claim:
    least, most = bounds[spec.kind]
    return Claim(score, unit_cost(spec, config), least, most, usual_size(spec, config))


def _checked_bank(model: nn.Module) -> AdapterBank:
    bank = find_bank(model)
    if bank is None:
        raise AdapterError(
            f"{type(model).__name__} has no hybrid adapter; add_hybrid_adapter_to_model adds one"
        )
    check_unmerged(model)
    return bank


def _bounds(
    config: HybridAdapterConfig,
    min_rank: int,
    max_rank: int,
    min_width: int | None,
    max_width: int | None,
) -> Bounds:
    ranks = _checked_range("rank", min_rank, max_rank)
    per_rank = config.adapter_size / config.lora_rank
    usual = [max(1, round(rank * per_rank)) for rank in ranks]
    least = usual[0] if min_width is None else min_width
    most = usual[1] if max_width is None else max_width
    widths = _checked_range("width", least, most)
    return {"lora": ranks, "bottleneck": widths, "block": widths}


def _checked_range(name: str, least: int, most: int) -> tuple[int, int]:
    check_integer(f"min_{name}", least)
    check_integer(f"max_{name}", most)
    if least > most:
        raise AdapterError(
            f"max_{name}: got {most}, allowed: an integer from min_{name}, which is {least}"
        )
    return least, most


def _check_scores(scores: Mapping[str, float], specs: tuple[SiteSpec, ...]) -> None:
    if not isinstance(scores, Mapping):
        raise AdapterError(f"scores: got {scores!r}, allowed: a mapping from module path to score")
    paths = {spec.path for spec in specs}
    missing, unknown = sorted(paths - scores.keys()), sorted(scores.keys() - paths, key=str)
    if missing or unknown:
        parts = [f"none for {listed(missing)}"] * bool(missing)
        parts += [f"one for {listed(unknown)}, not adapted"] * bool(unknown)
        raise AdapterError(
            f"scores: got {' and '.join(parts)}; allowed: one for every adapted module"
        )
    for path, score in scores.items():
        if not is_number(score) or score < 0:
            raise AdapterError(f"scores: got {score!r} for {path}, allowed: a finite number from 0")
    if not any(scores.values()):
        raise AdapterError("scores: got 0 for every module, allowed: at least one above 0")


def _budget(budget: int | None, claims: list[Claim]) -> int:
    if budget is None:
        return sum(claim.cost * claim.usual for claim in claims)
    least = sum(claim.cost * claim.least for claim in claims)
    most = sum(claim.cost * claim.most for claim in claims)
    if not is_integer(budget) or not least <= budget <= most:
        raise AdapterError(
            f"budget: got {budget!r}, allowed: an integer from {least:,} (every module at its"
            f" minimum) to {most:,} (at its maximum)"
        )
    return budget


def _note(budget: int, cost: int, claims: list[Claim]) -> str:
    if cost > budget:
        return "the minimum of every module costs more than the budget; the bounds win"
    if budget - cost >= max(claim.cost for claim in claims):
        return "the maximum of every module costs less than the budget; the bounds win"
    return ""


def _stored(bank: AdapterBank) -> int:
    return sum(parameter.numel() for parameter in bank.parameters())
