"""How much an error in each column of a weight counts: the mean square of what it multiplies."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..errors import AdapterError
from ..importance.data import batches_of, to_device

BATCHES, BATCH_SIZE = 16, 8


@torch.no_grad()
def column_importance(
    model: nn.Module, layers: Mapping[str, nn.Module], data: Iterable[Any]
) -> dict[str, torch.Tensor]:
    """Path -> E[x²] fp32 [in] of each layer over at most 16 batches of `data`; then as before.

    Of a dataset of examples, 16 batches of 8 are drawn, always the same. A layer that was not
    called is left out.

    Raises `AdapterError` where there is no batch, or a layer reads inf or nan.
    """
    sums: dict[str, torch.Tensor] = {}
    rows: dict[str, int] = {}
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    batches = 0
    with ExitStack() as stack:
        for path, module in layers.items():
            hook = _adder(path, sums, rows)
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        try:
            model.eval()
            for batch in batches_of(data, BATCHES, BATCH_SIZE, None):
                model(**to_device(batch, device))
                batches += 1
        finally:
            for module, training in modes:
                module.training = training
    if not batches:
        raise AdapterError("data: got no batch, allowed: at least one")
    for path, total in sums.items():
        if not torch.isfinite(total).all():
            raise AdapterError(f"data: {path} reads inf or nan, allowed: finite numbers")
    return {path: total / rows[path] for path, total in sums.items() if rows[path]}


def _adder(path: str, sums: dict[str, torch.Tensor], rows: dict[str, int]):
    def add(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = (*args, *kwargs.values())[0].flatten(0, -2).float()
        sums[path] = sums.get(path, 0.0) + x.square().sum(0)
        rows[path] = rows.get(path, 0) + x.shape[0]

    return add
