"""`analyze_layer_importance`: a score for each module that is, or would be, adapted."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..batches import Batch, batches_of, to_device
from ..config import HybridAdapterConfig
from ..errors import AdapterError
from ..layers.bank import find_bank
from ..layers.linear import dense_weight_of, is_linear
from ..merging import check_unmerged
from ..plan import SiteSpec
from ..schema import check_integer
from ..targets import make_plan
from .gradients import watched
from .moments import Moments
from .scores import METHODS

Loss = Callable[[nn.Module, Batch], torch.Tensor]


def analyze_layer_importance(
    model: nn.Module,
    dataset: Iterable[Any],
    *,
    method: str = "snr",
    batches: int = 8,
    batch_size: int = 8,
    config: HybridAdapterConfig | None = None,
    collate: Callable[[list], Mapping[str, Any]] | None = None,
    loss: Loss | None = None,
) -> dict[str, float]:
    """Return {module path: score} for the adapted modules of `model`; scores sum to 1.

    Works on a fresh hybrid, on a trained one, and on a base that has none yet: then `config` says
    which modules count (default: `HybridAdapterConfig()`). The model runs in evaluation mode and is
    left as it was, parameters, gradients, modes, hooks and random generators included. The same
    data give the same scores.

    Args:
        model: a transformers model, or any module if `loss` is given.
        dataset: a list of batches or a DataLoader, or a dataset or list of examples of one length;
            labels included.
        method: "snr", "weight_snr", "sensitivity" or "energy" (see docs/importance.md).
        batches: how many to use at most; the first two methods need at least 2.
        batch_size: examples a batch, where `dataset` holds examples.
        config: the adapter to be, where `model` has none.
        collate: makes a batch of a list of examples; default: transformers' default collator.
        loss: (model, batch) -> 0-d loss; default: the `loss` that the model returns.

    Raises:
        AdapterError: no such method, no batch, a batch without labels, a loss that is not finite,
            a merged adapter, or no gradient at any module.
    """
    found = gradient_moments(
        model,
        dataset,
        method=method,
        batches=batches,
        batch_size=batch_size,
        config=config,
        collate=collate,
        loss=loss,
    )
    needs = METHODS[method]
    raw = {
        path: needs.score(moments, _weight(model, path) if needs.weight else None)
        for path, moments in found.items()
    }
    total = sum(raw.values())
    if not total > 0 or not math.isfinite(total):
        raise AdapterError(
            f"the scores of the {len(raw)} modules sum to {total}: no finite gradient of the loss"
            " reaches them"
        )
    return {path: value / total for path, value in raw.items()}


def gradient_moments(
    model: nn.Module,
    dataset: Iterable[Any],
    *,
    method: str = "snr",
    batches: int = 8,
    batch_size: int = 8,
    config: HybridAdapterConfig | None = None,
    collate: Callable | None = None,
    loss: Loss | None = None,
) -> dict[str, Moments]:
    """Return the moments of the gradients that `method` is made of; arguments as above."""
    if method not in METHODS:
        raise AdapterError(f"method: got {method!r}, allowed: {', '.join(METHODS)}")
    check_integer("batches", batches)
    check_integer("batch_size", batch_size)
    sites, config = _sites(model, config)
    device = next(model.parameters()).device
    count = 0
    with watched(model, sites, config, METHODS[method].reading) as found, torch.enable_grad():
        source = batches_of(dataset, batches, batch_size, collate)
        for batch in tqdm(source, "importance", batches, unit="batch", disable=None, leave=False):
            value = (loss or _own_loss)(model, to_device(batch, device))
            _check_loss(value, count)
            value.backward()
            count += 1
            for moments in found.values():
                moments.end_batch()
    if count < METHODS[method].least:
        raise AdapterError(
            f"dataset: got {count} batches, allowed: {METHODS[method].least} or more for"
            f" method {method!r}"
        )
    return found


def _own_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    value = getattr(model(**batch), "loss", None)
    if value is None:
        raise AdapterError(
            f"dataset: a batch of {', '.join(batch)} gives no loss; allowed: batches with labels,"
            " or a `loss` of your own"
        )
    return value


def _check_loss(value: Any, number: int) -> None:
    if not isinstance(value, torch.Tensor) or value.dim() or not torch.isfinite(value):
        given = value.tolist() if isinstance(value, torch.Tensor) else value
        raise AdapterError(f"the loss of batch {number}: got {given}, allowed: a finite 0-d tensor")
    if not value.requires_grad:
        raise AdapterError(f"the loss of batch {number} depends on none of the modules")


def _sites(
    model: nn.Module, config: HybridAdapterConfig | None
) -> tuple[tuple[SiteSpec, ...], HybridAdapterConfig]:
    """The modules that count, and the configuration of the adapter that they have or would get."""
    bank = find_bank(model)
    if bank is None:
        config = config or HybridAdapterConfig()
        return make_plan(model, config).sites, config
    if config is not None:
        raise AdapterError("config: the model has a hybrid adapter already; leave config out")
    check_unmerged(model)
    return bank.plan().sites, bank.config


def _weight(model: nn.Module, path: str) -> torch.Tensor | None:
    """The base's [out, in] weight of a linear layer, unpacked; None for a block."""
    module = model.get_submodule(path)
    return dense_weight_of(module) if is_linear(module) else None
