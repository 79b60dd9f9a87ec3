"""Loading a quantized base from its file: into a model, or from a configuration; whole or not."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PretrainedConfig

from artemis_kernels import QuantizedWeight

from ..architectures import output_head
from ..errors import AdapterError, listed
from ..experts import is_experts
from ..layers.expert_weights import ExpertWeights
from ..layers.packed import parts_of, sample_of
from ..layers.packed_experts import pack_experts
from ..layers.packed_linear import QUANTIZED, pack
from ..paths import leaf_of, owner_of
from .fit import layers_to_pack
from .report import LayerReport
from .store import StoredBase, is_meta, named_tensors, read_stored


def load_quantized(
    model_or_config: nn.Module | PretrainedConfig, path: str | os.PathLike
) -> nn.Module:
    """Return the model that `save_quantized` saved in `path`.

    Args:
        model_or_config: a model of the saved one's class and sizes, neither quantized nor adapted,
            whose tensors are replaced in place (on its device; one on the meta device lands on
            the CPU); or its configuration, from which transformers' class of the saved name is
            built without ever holding the full weights, with the saved generation_config.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterError: a damaged or foreign file, another model than the saved one, or something
            that is neither a model nor a configuration.

    After these, and after an interruption, the model is as it was.
    """
    model = model_or_config
    if not isinstance(model, (nn.Module, PretrainedConfig)):
        raise AdapterError(
            f"model_or_config: got {type(model).__name__}, allowed: a model, or the configuration"
            " of one (transformers' AutoConfig.from_pretrained)"
        )
    stored = read_stored(path)
    if isinstance(model, PretrainedConfig):
        model = _empty(model, stored)
    layers = layers_to_pack(model, stored)
    with safe_open(stored.path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with _all_or_nothing(model):
        _put(model, stored, layers, tensors)
        model.quantization_report = stored.report
    return model


def _empty(config: PretrainedConfig, stored: StoredBase) -> nn.Module:
    """A model of the saved class on the meta device."""
    cls = getattr(transformers, stored.class_name, None)
    if cls is None:
        raise AdapterError(
            f"{stored.path}: transformers has no class {stored.class_name}; give the model itself"
        )
    with torch.device("meta"):
        model = cls(config).eval()
    for module in model.modules():
        lost = [n for n, v in vars(module).items() if isinstance(v, torch.Tensor) and v.is_meta]
        if lost:  # neither parameters nor buffers, so no file holds them
            raise AdapterError(
                f"{stored.class_name} keeps tensors that are not saved ({listed(lost)}); give the"
                " model itself"
            )
    if stored.generation is not None:
        model.generation_config = GenerationConfig.from_dict(dict(stored.generation))
    return model


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Every module gets its class and attributes back where the body does not end."""
    kept = [(module, module.__class__, _attributes(module)) for module in model.modules()]

    def restore() -> None:
        for module, cls, attributes in kept:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)

    with ExitStack() as undo:
        undo.callback(restore)
        yield
        undo.pop_all()


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes, the tables of tensors among them copied, since those are changed in place."""
    tables = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    return {**vars(module), **{name: vars(module)[name].copy() for name in tables}}


def _put(
    model: nn.Module,
    stored: StoredBase,
    layers: Mapping[str, nn.Module],
    tensors: dict[str, torch.Tensor],
) -> None:
    """Replace the model's tensors by the file's, which were compared with it."""
    device = torch.device("cpu") if is_meta(model) else next(model.parameters()).device
    weights: dict[str, dict] = {path: {} for path in layers}
    for entry in stored.report.layers:
        weight = _weight(stored, entry, tensors).to(device)
        taken = tensors.pop(sample_of(entry.parameter)).to(device)
        weights[owner_of(entry.parameter)][leaf_of(entry.parameter)] = weight, taken
    head = output_head(model)
    for path, module in layers.items():
        if is_experts(module):
            pack_experts(module, weights[path])
            continue
        weight, taken = weights[path]["weight"]
        weight = replace(weight, makes_logits=module is head)
        pack(module, QUANTIZED[type(module)], weight, taken, untied=path in stored.untied)
    known = dict(named_tensors(model))
    made = {
        name: _in_place_of(known[name], tensor.to(device))
        for name, tensor in tensors.items()
        if name in known
    }
    for name in known:
        tensor = made.get(stored.aliases.get(name, name))
        if tensor is not None:
            setattr(model.get_submodule(owner_of(name)), leaf_of(name), tensor)


def _in_place_of(known: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(known, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, known.requires_grad)


def _weight(
    stored: StoredBase, entry: LayerReport, tensors: dict[str, torch.Tensor]
) -> QuantizedWeight | ExpertWeights:
    data, scale, offset = (tensors.pop(part, None) for part in parts_of(entry.parameter))
    if entry.format == "fp8":
        if data.dtype != torch.uint8:
            raise AdapterError(
                f"{stored.path}: {entry.path} is damaged: its numbers are {data.dtype}, allowed:"
                " torch.uint8"
            )
        data = data.view(torch.float8_e4m3fn)
    kind = ExpertWeights if entry.experts else QuantizedWeight
    form = (entry.format, entry.group_size, stored.report.activation_bits)
    try:
        weight = kind(data, scale, offset, *form)
    except ValueError as error:
        raise AdapterError(f"{stored.path}: {entry.path} is damaged ({error})") from None
    if weight.shape != entry.shape:
        raise AdapterError(f"{stored.path}: {entry.path} is damaged: got {tuple(weight.shape)}")
    return weight
