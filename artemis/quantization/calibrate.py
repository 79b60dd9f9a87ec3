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

    Of a dataset of examples, 16 batches of 8 are drawn, always the same. Tokens that a batch's
    `attention_mask` leaves out do not count. A layer that was not called is left out.

    Raises `AdapterError` where there is no batch, or a layer reads inf or nan.
    """
    squares = _Squares()
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    batches = 0
    with ExitStack() as stack:
        for path, module in layers.items():
            handle = module.register_forward_pre_hook(squares.adder(path), with_kwargs=True)
            stack.callback(handle.remove)
        try:
            model.eval()
            for batch in batches_of(data, BATCHES, BATCH_SIZE, None):
                batch = to_device(batch, device)
                squares.mask = batch.get("attention_mask")
                model(**batch)
                batches += 1
        finally:
            for module, training in modes:
                module.training = training
    if not batches:
        raise AdapterError("data: got no batch, allowed: at least one")
    for path, total in squares.sums.items():
        if not torch.isfinite(total).all():
            raise AdapterError(f"data: {path} reads inf or nan, allowed: finite numbers")
    return {p: total / squares.rows[p] for p, total in squares.sums.items() if squares.rows[p]}


class _Squares:
    """Sums of x² by column of each layer, over the rows that are not padding."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.rows: dict[str, int] = {}
        #: The batch's `attention_mask`: padding is 0.
        self.mask: torch.Tensor | None = None

    def adder(self, path: str):
        """A forward pre-hook."""

        def add(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = self._without_padding((*args, *kwargs.values())[0]).float()
            self.sums[path] = self.sums.get(path, 0.0) + x.square().sum(0)
            self.rows[path] = self.rows.get(path, 0) + x.shape[0]

        return add

    def _without_padding(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [rows, in]; all rows where the mask is of another shape than they."""
        if self.mask is None or self.mask.shape != x.shape[:-1]:
            return x.flatten(0, -2)
        return x[self.mask.bool()]
