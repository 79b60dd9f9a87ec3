"""How much an error in each column of a weight counts: the mean square of what it multiplies."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..batches import Batch, batches_of, to_device
from ..errors import AdapterError
from ..experts import bias_of, expert_output, is_experts, matrices_of, stack_of
from ..layers.routing import Routing
from ..modes import evaluating

BATCHES, BATCH_SIZE = 16, 8


@torch.no_grad()
def column_importance(
    model: nn.Module, layers: Mapping[str, nn.Module], data: Iterable[Any]
) -> dict[str, torch.Tensor]:
    """Path -> E[x²] fp32 [in] of each layer over at most 16 batches of `data`; then as before.

    Of experts, `matrix_of` each. Of examples, 16 batches of 8 are drawn, always the same. Tokens
    that a batch's `attention_mask` (a decoder's beside an encoder: `decoder_attention_mask`) leaves
    out do not count. A layer, or an expert, that was not called is left out.

    Raises `AdapterError` where there is no batch, or a layer reads inf or nan.
    """
    padding = _Padding(model)
    squares = _Squares(padding)
    device = next(model.parameters()).device
    batches = 0
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if padding.encoder is not None:
            stack.callback(padding.encoder.register_forward_hook(padding.keep).remove)
        for path, module in layers.items():
            adder = squares.of_experts if is_experts(module) else squares.of_layer
            hook = module.register_forward_pre_hook(adder(path), with_kwargs=True)
            stack.callback(hook.remove)
        for batch in batches_of(data, BATCHES, BATCH_SIZE, None, "data"):
            batch = to_device(batch, device)
            padding.begin(batch)
            model(**batch)
            batches += 1
    if not batches:
        raise AdapterError("data: got no batch, allowed: at least one")
    for path, total in squares.sums.items():
        if not torch.isfinite(total).all():
            raise AdapterError(f"data: {path} reads inf or nan, allowed: finite numbers")
    return {p: total / squares.rows[p] for p, total in squares.sums.items() if squares.rows[p]}


def matrix_of(path: str, name: str, expert: int) -> str:
    """What one expert's matrix is known by in `column_importance`."""
    return f"{path}.{name}.{expert}"


class _Padding:
    """The mask of what a layer reads; padding is 0.

    Beside a decoder, a batch's `attention_mask` is of the encoder's tokens: of what its layers
    read, and of what others read of its output, as cross attention's keys and values do.
    """

    def __init__(self, model: nn.Module):
        both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        #: Of a model that has a decoder too; else None.
        self.encoder = model.get_encoder() if both and hasattr(model, "get_encoder") else None
        self._inside = set() if self.encoder is None else set(self.encoder.modules())

    def begin(self, batch: Batch) -> None:
        self._batch, self._output = batch, None

    def keep(self, encoder: nn.Module, args: tuple, output: Any) -> None:
        """A forward hook of the encoder."""
        self._output = output if isinstance(output, torch.Tensor) else output[0]

    def mask(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        of_encoder = self.encoder is None or module in self._inside or self._is_output(x)
        return self._batch.get("attention_mask" if of_encoder else "decoder_attention_mask")

    def _is_output(self, x: torch.Tensor) -> bool:
        output = self._output
        return output is not None and x.data_ptr() == output.data_ptr() and x.shape == output.shape


class _Squares:
    """Sums of x² by column of each layer, over the rows that are not padding."""

    def __init__(self, padding: _Padding):
        self.sums: dict[str, torch.Tensor] = {}
        self.rows: dict[str, int] = {}
        self._padding = padding

    def of_layer(self, path: str):
        """A forward pre-hook of a linear layer."""

        def add(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = (*args, *kwargs.values())[0]
            self._add(path, _without_padding(x, self._padding.mask(module, x)))

        return add

    def of_experts(self, path: str):
        """A forward pre-hook of experts, whose rows pass each by itself once more."""

        def add(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden, chosen, _ = (*args, *kwargs.values())
            mask = self._padding.mask(module, hidden)
            if mask is not None and mask.numel() == len(hidden):
                hidden, chosen = (t[mask.flatten().bool()] for t in (hidden, chosen))
            routing = Routing.of(chosen, module.num_experts)
            for expert, rows in enumerate(routing.rows(hidden).split(routing.counts)[:-1]):
                layers = (self._layer(path, module, n, expert) for n in matrices_of(module))
                expert_output(module, rows, *layers)

        return add

    def _layer(self, path: str, module: nn.Module, name: str, expert: int):
        def layer(x: torch.Tensor) -> torch.Tensor:
            self._add(matrix_of(path, name, expert), x)
            weight, bias = stack_of(module, name)[expert], bias_of(module, name, expert)
            return functional.linear(x, weight, bias)

        return layer

    def _add(self, key: str, x: torch.Tensor) -> None:
        """x [rows, in] is what the matrix known as `key` multiplies."""
        self.sums[key] = self.sums.get(key, 0.0) + x.float().square().sum(0)
        self.rows[key] = self.rows.get(key, 0) + x.shape[0]


def _without_padding(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """x [..., in] -> [rows, in]; all rows where the mask is of another shape than they."""
    if mask is None or mask.shape != x.shape[:-1]:
        return x.flatten(0, -2)
    return x[mask.bool()]
