"""Whether the base in a file is that of the model at hand; nothing is changed."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..errors import AdapterError, listed
from ..experts import is_experts
from ..layers.bank import find_bank
from ..layers.packed import packed_modules, parts_of, sample_of
from ..layers.packed_linear import QUANTIZED
from ..paths import leaf_of, owner_of
from ..wrappers import check_bare
from .choice import weights_of
from .report import LayerReport
from .store import StoredBase, is_meta, named_tensors


def layers_to_pack(model: nn.Module, stored: StoredBase) -> dict[str, nn.Module]:
    """Path -> each module whose weights are packed in the file, of the shapes that it has there.

    Raises `AdapterError` where the file is not this model's, listing what differs.
    """
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
        path = owner_of(entry.parameter)
        layers[path] = module = modules.get(path)
        shape = _shape(path, module, entry)
        if shape != entry.shape:
            what = type(module).__name__ if shape is None else "x".join(map(str, shape))
            wanted = "x".join(map(str, entry.shape))
            kind = "experts" if entry.experts else "a linear layer"
            problems.append(f"{entry.path} is {what}, in the file {kind} of {wanted}")
    problems = problems or _differences(model, stored, layers)
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
    """Packed layers of other names, and other tensors of one side only or of another shape."""
    packed = [entry.parameter for entry in stored.report.layers]
    parts = {part for name in packed for part in (*parts_of(name), sample_of(name))}
    my_names = _names(model, layers)
    their_names = {path: path for path in layers} | {
        owner_of(name): owner_of(first) for name, first in stored.aliases.items() if first in parts
    }
    weights = {(owner_of(name), leaf_of(name)) for name in packed}
    mine = {
        name: tuple(t.shape)
        for name, t in named_tensors(model)
        if (my_names.get(owner_of(name)), leaf_of(name)) not in weights
    }
    theirs = {name: shape for name, shape in stored.shapes.items() if name not in parts}
    theirs |= {
        name: stored.shapes[first] for name, first in stored.aliases.items() if first not in parts
    }
    if not is_meta(model):
        # Buffers outside the state may differ between versions; a model with values has its own.
        for name in mine.keys() - model.state_dict().keys():
            del mine[name]
            theirs.pop(name, None)
    return [
        *_compared(my_names, their_names, _name_in_words),
        *_compared(mine, theirs, lambda shape: "missing" if shape is None else str(shape)),
    ]


def _names(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Each name of a layer, of which it may have several -> the one that it is stored under."""
    paths = {id(module): path for path, module in layers.items()}
    modules = model.named_modules(remove_duplicate=False)
    return {name: paths[id(module)] for name, module in modules if id(module) in paths}


def _compared(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], in_words: Callable[[Any], str]
) -> list[str]:
    """What differs under each name; `in_words` tells a value, and None where there is none."""
    return [
        f"{name} is {in_words(mine.get(name))}, in the file {in_words(theirs.get(name))}"
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    ]


def _name_in_words(first: str | None) -> str:
    return "none of a packed layer" if first is None else f"another name of {first}"
