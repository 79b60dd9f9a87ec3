"""`quantize_adapter_model`: one layer after the other, in place."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from artemis_kernels import QuantizedWeight

from ..architectures import output_head, stacked_weights
from ..experts import is_experts, matrices_of, stack_of
from ..layers.adapted import PACKED
from ..layers.bank import find_bank
from ..layers.expert_weights import ExpertWeights
from ..layers.linear import weight_of
from ..layers.packed import packed_modules, sample
from ..layers.packed_experts import pack_experts
from ..layers.packed_linear import pack
from . import adapters
from .begun import BEGUN, Begun, begun
from .calibrate import column_importance, matrix_of
from .choice import choose_layers, tied_to, weights_of
from .options import Options, checked_options
from .report import LayerReport, QuantizationReport

_CHUNK = 1 << 22  # weights whose error is worked out at a time


@torch.no_grad()
def quantize_adapter_model(
    model: nn.Module,
    bits: int = 8,
    adapter_bits: int = 16,
    *,
    format: str = "int",
    group_size: int | None = None,
    activation_bits: int | str = "auto",
    data: Iterable[Any] | None = None,
    include_head: bool = False,
    leave: Iterable[str] = (),
    progress: bool = True,
) -> nn.Module:
    """Hold the linear layers and experts of `model` in few bits, in place, and return the model.

    It may have a hybrid adapter, or get one afterwards. Embeddings, norms, heads that train and
    the output head stay as they are, and so do experts whose form transformers does not state, with
    a warning where that is most of the model. Each weight is dropped before the next is packed.
    What was done stands in `model.quantization_report`, which prints as a table. A call that is
    interrupted leaves a model that computes, part of it packed; the same call again packs the rest.

    Args:
        bits: 8 or 4, of the base's weights.
        adapter_bits: 32, 16 (the model's own dtype of 16 bits, else bf16) or 8, of the adapter that
            the model has. Train in 32; 16 is for use; 8 is for use only, and cannot be saved.
        format: with 8 bits "int" or "fp8".
        group_size: with 4 bits, how many weights share a scale; None: 128 from 2,048 inputs on,
            else 64, or what divides.
        activation_bits: 16: products read x as it is. 8: x and dY are rounded to 8 bits, row by
            row (int8 and fp8 weights). "auto": 8 where it is faster, else 16.
        data: with 4 bits, batches of the model's arguments, or a dataset or list of examples of
            one length, to weigh the error of a column by the mean square of what it multiplies.
        include_head: take the output head too. One that is tied to the embedding becomes a matrix
            of its own: products are faster, and memory grows by it, since the embedding stays.
        leave: paths of modules to leave as they are, all that is in them included: those that an
            adapter added later will train whole (`modules_to_save`), since packed ones cannot.
        progress: show a progress bar where standard error is a terminal.

    Raises:
        AdapterError: options that make no sense, a model quantized already, merged or wrapped, a
            layer (or, with adapter_bits=8, an adapter) whose shape or values do not fit; before
            anything is changed.
    """
    options = checked_options(
        bits, format, group_size, activation_bits, adapter_bits, include_head, data is not None,
        leave,
    )  # fmt: skip
    layers, skipped = choose_layers(model, options)
    state = begun(model) or _begin(model, layers, options)
    bank = find_bank(model)
    if bank is not None:
        adapters.check_adapter(bank, options.adapter_bits, state.dtype)
    importance = {} if data is None else column_importance(model, layers, data)
    setattr(model, BEGUN, state)
    _pack_all(model, layers, state, importance, progress)
    if bank is not None:
        adapters.hold(bank, options.adapter_bits, state.dtype)
    model.quantization_report = _report(model, state, skipped)
    delattr(model, BEGUN)
    _warn_of_experts(model)
    return model


def _report(model: nn.Module, state: Begun, skipped: Mapping[str, str]) -> QuantizationReport:
    """What was done, by calls that were interrupted too, in the model's order."""
    packed = tuple(
        state.reports[f"{path}.{name}"]
        for path, module in packed_modules(model)
        for name in module.packed_shapes()
    )
    return QuantizationReport(
        packed, skipped, state.options.activation_bits, state.bytes_before, _model_bytes(model)
    )


def _warn_of_experts(model: nn.Module) -> None:
    """Warn where more weights are in experts, and stay as they were, than are packed."""
    packed = sum(prod(layer.shape) for layer in model.quantization_report.layers)
    stacks = (m.get_parameter(n) for m in model.modules() for n in stacked_weights(m))
    left = sum({id(stack): stack.numel() for stack in stacks}.values())
    if left > packed:
        warnings.warn(
            f"{type(model).__name__}: {left / (left + packed):.0%} of the weights that could be"
            " packed are experts held as one parameter, and stay as they were"
            " (quantization_report.skipped)",
            stacklevel=4,
        )


def _begin(model: nn.Module, layers: Mapping[str, nn.Module], options: Options) -> Begun:
    _, weight = next(weights_of(*next(iter(layers.items()))))
    return Begun(options, weight.dtype, _model_bytes(model))


def _pack_all(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    state: Begun,
    importance: Mapping[str, torch.Tensor],
    progress: bool,
) -> None:
    bank = find_bank(model)
    if bank is not None:
        bank.forget()  # constants of the weights that go
    bar = tqdm(layers.items(), "quantizing", unit="layer", disable=None if progress else True)
    for path, module in bar:
        if is_experts(module):
            _pack_experts(path, module, state, importance)
        else:
            _pack_layer(model, path, module, state, importance.get(path))


def _pack_layer(
    model: nn.Module,
    path: str,
    module: nn.Module,
    state: Begun,
    importance: torch.Tensor | None,
) -> None:
    weight, options = weight_of(module).detach(), state.options
    makes_logits, untied = module is output_head(model), tied_to(model, module) is not None
    packed = QuantizedWeight.quantize(
        weight, options.format, group_size=options.group_size,
        activation_bits=options.activation_bits, importance=importance, makes_logits=makes_logits,
    )  # fmt: skip
    state.reports[f"{path}.weight"] = LayerReport(
        path, *weight.shape, packed.format, packed.group_size, weight.nbytes, packed.nbytes,
        _relative_error([(weight, packed)]),
    )  # fmt: skip
    pack(module, PACKED[type(module)], packed, sample(module.weight), untied)


def _pack_experts(
    path: str, module: nn.Module, state: Begun, importance: Mapping[str, torch.Tensor]
) -> None:
    options, weights = state.options, {}
    for name in matrices_of(module):
        stack = stack_of(module, name)
        counts = [importance.get(matrix_of(path, name, e)) for e in range(len(stack))]
        packed = ExpertWeights.quantize(
            stack, options.format, group_size=options.group_size,
            activation_bits=options.activation_bits, importance=counts,
        )  # fmt: skip
        count, *matrix = stack.shape
        state.reports[f"{path}.{name}"] = LayerReport(
            f"{path}.{name}", *matrix, packed.format, packed.group_size, stack.nbytes,
            packed.nbytes, _relative_error(zip(stack, packed, strict=True)), count,
        )  # fmt: skip
        weights[name] = packed, sample(module._parameters[name])
    pack_experts(module, weights)


def _relative_error(pairs: Iterable[tuple[torch.Tensor, QuantizedWeight]]) -> float:
    """rms(packed − weight) / rms(weight) of all pairs as one; 0 for weights that are zero."""
    error, size = 0.0, 0.0
    for weight, packed in pairs:
        for part, numbers in _chunks(weight, packed):
            size += part.square().sum(dtype=torch.float64).item()
            error += (part - numbers).square_().sum(dtype=torch.float64).item()
    return (error / size) ** 0.5 if size else 0.0


def _chunks(
    weight: torch.Tensor, packed: QuantizedWeight
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Some rows at a time: of the weight in fp32, and of what the numbers stand for."""
    rows = max(1, _CHUNK // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        yield weight[part].float(), packed.rows(start, start + rows).dequantize()


def _model_bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
