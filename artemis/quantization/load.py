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
from ..layers.bank import find_bank
from ..layers.expert_weights import ExpertWeights
from ..layers.packed import packed_modules, parts_of, sample_of
from ..layers.packed_experts import pack_experts
from ..layers.packed_linear import QUANTIZED, pack
from ..wrappers import check_bare
from .choice import weights_of
from .report import LayerReport
from .store import StoredBase, named_tensors, read_stored


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
    layers = _check(model, stored)
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


def _check(model: nn.Module, stored: StoredBase) -> dict[str, nn.Module]:
    """The layers to pack by path; `AdapterError` where the file is not this model's."""
    check_bare(model)
    name = type(model).__name__
    if find_bank(model) is not None or any(packed_modules(model)):
        raise AdapterError(
            f"{name} is adapted or quantized already, allowed: a plain model; load the adapter"
            " after the base"
        )
    problems = []
    if name != stored.class_name:
        problems.append(f"the model is a {name}, the file's a {stored.class_name}")
    modules, layers = dict(model.named_modules()), {}
    for entry in stored.report.layers:
        path = _owner(entry.parameter)
        layers[path] = module = modules.get(path)
        shape = _shape(path, module, entry)
        if shape != entry.shape:
            what = type(module).__name__ if shape is None else "x".join(map(str, shape))
            wanted = "x".join(map(str, entry.shape))
            kind = "experts" if entry.experts else "a linear layer"
            problems.append(f"{entry.path} is {what}, in the file {kind} of {wanted}")
    if not problems:
        problems = _differences(model, stored, layers)
    if problems:
        raise AdapterError(f"{stored.path} does not fit the model: {listed(problems)}")
    return layers


def _shape(path: str, module: nn.Module | None, entry: LayerReport) -> tuple[int, ...] | None:
    """The shape of the weight that `entry` is about; None: the module has none such."""
    packable = is_experts(module) if entry.experts else type(module) in QUANTIZED
    weights = dict(weights_of(path, module)) if packable else {}
    return tuple(weights[entry.path].shape) if entry.path in weights else None


def _differences(
    model: nn.Module, stored: StoredBase, layers: Mapping[str, nn.Module]
) -> list[str]:
    """Tensors that only one side has, or in another shape; packed layers are compared already."""
    paths = {id(module): path for path, module in layers.items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    packed = [entry.parameter for entry in stored.report.layers]
    parts = {part for name in packed for part in (*parts_of(name), sample_of(name))}
    # A layer may have several names: each -> the one that it is stored under.
    my_names = {name: paths[id(m)] for name, m in modules.items() if id(m) in paths}
    their_names = {path: path for path in layers} | {
        _owner(name): _owner(first) for name, first in stored.aliases.items() if first in parts
    }
    weights = {(_owner(name), _leaf(name)) for name in packed}
    mine = {
        name: tuple(t.shape)
        for name, t in named_tensors(model)
        if (my_names.get(_owner(name)), _leaf(name)) not in weights
    }
    theirs = {name: shape for name, shape in stored.shapes.items() if name not in parts}
    theirs |= {
        name: stored.shapes.get(first)
        for name, first in stored.aliases.items()
        if first not in parts
    }
    # Buffers outside the state may differ between versions; a model with values has its own.
    optional = set() if _is_meta(model) else mine.keys() - model.state_dict().keys()
    names = sorted((mine.keys() | theirs.keys()) - optional)
    return [
        f"{name} is {_named_layer(my_names, name)}, in the file {_named_layer(their_names, name)}"
        for name in sorted(my_names.keys() | their_names.keys())
        if my_names.get(name) != their_names.get(name)
    ] + [
        f"{name} is {mine.get(name, 'missing')}, in the file {theirs.get(name, 'missing')}"
        for name in names
        if mine.get(name) != theirs.get(name)
    ]


def _named_layer(names: Mapping[str, str], name: str) -> str:
    return f"another name of {names[name]}" if name in names else "none of a packed layer"


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


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


def _is_meta(model: nn.Module) -> bool:
    return any(tensor.is_meta for _, tensor in named_tensors(model))


def _put(
    model: nn.Module,
    stored: StoredBase,
    layers: Mapping[str, nn.Module],
    tensors: dict[str, torch.Tensor],
) -> None:
    """Replace the model's tensors by the file's, which were compared with it."""
    device = torch.device("cpu") if _is_meta(model) else next(model.parameters()).device
    weights: dict[str, dict] = {path: {} for path in layers}
    for entry in stored.report.layers:
        weight = _weight(stored, entry, tensors).to(device)
        taken = tensors.pop(sample_of(entry.parameter)).to(device)
        weights[_owner(entry.parameter)][_leaf(entry.parameter)] = weight, taken
    head = output_head(model)
    for path, module in layers.items():
        if is_experts(module):
            pack_experts(module, weights[path])
            continue
        weight, taken = weights[path]["weight"]
        weight = replace(weight, makes_logits=module is head)
        pack(module, QUANTIZED[type(module)], weight, taken, untied=path in stored.untied)
    placed = {name: tensor.to(device) for name, tensor in tensors.items()}
    known = dict(named_tensors(model))
    made = {
        name: nn.Parameter(tensor, known[name].requires_grad)
        if isinstance(known[name], nn.Parameter)
        else tensor
        for name, tensor in placed.items()
        if name in known
    }
    for name in known:
        tensor = made.get(stored.aliases.get(name, name))
        if tensor is not None:
            setattr(model.get_submodule(_owner(name)), _leaf(name), tensor)


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
