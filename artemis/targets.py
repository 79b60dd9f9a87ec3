"""Which modules a configuration means: names and patterns in, a checked `Plan` out."""

import re
import warnings
from collections.abc import Callable, Iterable
from functools import partial

from torch import nn

from . import architectures
from .config import AUTO, DEFAULT_LORA, DEFAULT_TARGETS, HybridAdapterConfig, Names
from .errors import AdapterError, listed, nearest
from .layers.linear import linear_features, linear_paths
from .layers.packed import is_packed
from .paths import is_within, layer_number, layer_of, leaf_of, owner_of
from .plan import Plan, SiteSpec


def matching(names: Names, path: str) -> str | None:
    """Return the entry of `names` that `path` matches, or None.

    A list entry equals the path or its last parts; a string is a regular expression for the whole
    path, and then the module's own name stands for the entry.
    """
    if isinstance(names, str):
        return leaf_of(path) if re.fullmatch(names, path) else None
    return next((name for name in names if path == name or path.endswith(f".{name}")), None)


def make_plan(model: nn.Module, config: HybridAdapterConfig) -> Plan:
    """Find what `config` means in `model`; raise `AdapterError` where it means nothing.

    Nothing is changed. Targets within a head are left out: a head trains as it is.
    """
    if config.lora_rank == AUTO:
        raise AdapterError(
            f"hybrid_adapter.lora_rank: got {AUTO!r}, allowed: an integer; choose_ranks(model,"
            " dataset, config) finds one, and `artemis train` does so by itself"
        )
    paths = [path for path, _ in model.named_modules() if path]
    matched = {path: entry for path in paths if (entry := matching(config.target_modules, path))}
    if not matched:
        raise AdapterError(_nothing_matches(model, config))
    can_be = partial(_can_be_target, model)
    _check_entries("target_modules", config.target_modules, paths, DEFAULT_TARGETS, can_be)
    _check_entries("exclude_modules", config.exclude_modules, paths, offered=can_be)
    heads = find_heads(model, config, paths)
    chosen = {
        path: entry
        for path, entry in matched.items()
        if not is_within(path, heads)
        and matching(config.exclude_modules, path) is None
        and (config.layers is None or layer_number(path) in config.layers)
    }
    _check_layers(config, matched)
    if not chosen:
        raise AdapterError(
            f"hybrid_adapter: all {len(matched)} matching modules are left out by exclude_modules,"
            " layers or modules_to_save"
        )
    _check_lora_entries(config, chosen)
    _check_readers(model, chosen)
    sites = tuple(_site(model, config, path, entry) for path, entry in chosen.items())
    _warn_of_other_layers(model, config, sites)
    return Plan(sites, heads)


def find_heads(
    model: nn.Module, config: HybridAdapterConfig, paths: Iterable[str]
) -> tuple[str, ...]:
    """Paths of the modules to train and save as they are; those inside another are left out.

    Warns where nobody said whether a model for another task than classification has a new head.
    """
    if config.modules_to_save is None:
        if unknown := architectures.unknown_heads(model):
            warnings.warn(
                f"{type(model).__name__}: {listed(unknown)}, beside the base model, will stay"
                " frozen and not be saved; if that is a new head, name it in modules_to_save"
                " ([] ends this warning)",
                stacklevel=4,
            )
        return architectures.classifier_heads(model)
    _check_entries("modules_to_save", config.modules_to_save, paths)
    heads = tuple(path for path in paths if matching(config.modules_to_save, path))
    return tuple(path for path in heads if not is_within(path, [h for h in heads if h != path]))


def _site(model: nn.Module, config: HybridAdapterConfig, path: str, target: str) -> SiteSpec:
    module = model.get_submodule(path)
    wants_lora = matching(config.apply_lora_to, path) is not None
    features = linear_features(module)
    if features:
        kind = "lora" if wants_lora else "bottleneck"
    elif wants_lora or not architectures.is_block(module):
        hint = ""
        if not wants_lora and (architectures.stacked_weights(module) or is_packed(module)):
            hint = "; it holds no layers but parameters: name the block around it"
        raise AdapterError(
            f"hybrid_adapter.target_modules: {path} is a {type(module).__name__}; allowed:"
            f" torch.nn.Linear or transformers' Conv1D, or, without LoRA, a block of layers{hint}"
        )
    else:
        kind, features = "block", _block_features(model, path)
    size = config.lora_rank if kind == "lora" else config.adapter_size
    return SiteSpec(path, kind, target, *features, size)


def _block_features(model: nn.Module, path: str) -> tuple[int, int]:
    hidden = architectures.hidden_size(model, path)
    if hidden is None:
        raise AdapterError(
            f"hybrid_adapter.target_modules: {path} is a block, and no config.hidden_size tells"
            " the size of its output; name its linear layers instead"
        )
    block = model.get_submodule(path)
    layers = [size for m in block.modules() if (size := linear_features(m))]
    if layers and layers[0][0] != hidden and layers[-1][1] != hidden:
        raise AdapterError(
            f"hybrid_adapter.target_modules: {path} is a block whose layers turn {layers[0][0]}"
            f" features into {layers[-1][1]}, and its config.hidden_size is {hidden}; name its"
            " linear layers instead, or leave it out (exclude_modules, or whole paths)"
        )
    return hidden, hidden


def _can_be_target(model: nn.Module, path: str) -> bool:
    module = model.get_submodule(path)
    adaptable = linear_features(module) is not None or architectures.is_block(module)
    return adaptable and architectures.reader_of(model, path) is None


def _check_entries(
    field: str,
    names: Names,
    paths: Iterable[str],
    defaults: tuple[str, ...] = (),
    offered: Callable[[str], bool] = lambda path: True,
) -> None:
    """Refuse an entry of `names` that matches no path; those from the default only warn.

    `offered`: of a path, whether its name may be a hint.
    """
    paths = list(paths)
    entries = [names] if isinstance(names, str) else names
    for entry in entries:
        one = entry if isinstance(names, str) else (entry,)
        if any(matching(one, path) for path in paths):
            continue
        hint = _closest(entry, filter(offered, paths), entries)
        message = f"hybrid_adapter.{field}: {entry!r} matches no module{hint}"
        if tuple(entries) != defaults:
            raise AdapterError(message)
        warnings.warn(message, stacklevel=4)


def _closest(entry: str, paths: Iterable[str], held: Iterable[str]) -> str:
    """A hint at the names of `paths` like `entry`, beside those that are `held` already."""
    parts = entry.count(".") + 1
    names = {".".join(path.split(".")[-parts:]) for path in paths}
    return nearest(entry, names.difference(held))


def _check_lora_entries(config: HybridAdapterConfig, chosen: Iterable[str]) -> None:
    """Entries that repeat `target_modules` were checked there; others must match a target."""
    names, targets = config.apply_lora_to, config.target_modules
    if isinstance(names, tuple) and not isinstance(targets, str):
        return
    if names == DEFAULT_LORA and any(matching(names, path) for path in chosen):
        return
    _check_entries("apply_lora_to", names, chosen)


def _check_layers(config: HybridAdapterConfig, matched: Iterable[str]) -> None:
    if config.layers is None:
        return
    numbers = {layer_number(path) for path in matched} - {None}
    missing = [number for number in config.layers if number not in numbers]
    if missing:
        raise AdapterError(
            f"hybrid_adapter.layers: got {listed(missing)}, allowed: the numbers of layers with"
            f" targets ({listed(sorted(numbers), limit=100) or 'none'})"
        )


def _check_readers(model: nn.Module, chosen: Iterable[str]) -> None:
    """Refuse layers whose forward, and so their adapter, would not run."""
    read = {path: reader for path in chosen if (reader := architectures.reader_of(model, path))}
    if read:
        readers = listed(dict.fromkeys(read.values()))
        raise AdapterError(
            f"hybrid_adapter.target_modules: got {listed(read)}, whose weights are read or changed"
            f" in {readers} past the layers, and so past any adapter; allowed: other layers"
            " (exclude_modules leaves these out)"
        )


def _warn_of_other_layers(
    model: nn.Module, config: HybridAdapterConfig, sites: Iterable[SiteSpec]
) -> None:
    """Warn where the default gives LoRA to some layers of a stack, and none to another kind."""
    if config.target_modules != DEFAULT_TARGETS or config.exclude_modules or config.layers:
        return
    adapted = {site.path for site in sites}
    with_lora = {layer_of(site.path) for site in sites if site.kind == "lora"} - {""}
    stacks = {owner_of(layer) for layer in with_lora}
    left = {}
    for path in linear_paths(model):
        layer = layer_of(path)
        free = path not in adapted and architectures.reader_of(model, path) is None
        if free and layer and layer not in with_lora and owner_of(layer) in stacks:
            left.setdefault(owner_of(layer), {})[leaf_of(layer), leaf_of(path)] = None
    for stack, found in left.items():
        numbers, names = (dict.fromkeys(values) for values in zip(*found, strict=True))
        warnings.warn(
            f"hybrid_adapter.target_modules: layers {listed(numbers)} of {stack} get no LoRA, since"
            f" their linear layers have other names ({listed(names)}); name them there and in"
            " apply_lora_to",
            stacklevel=4,
        )


def _nothing_matches(model: nn.Module, config: HybridAdapterConfig) -> str:
    suffixes = dict.fromkeys(map(leaf_of, linear_paths(model)))
    targets = config.target_modules
    if isinstance(targets, str):
        targets = f"{targets!r}, a regular expression for whole paths (names go in a list),"
    else:
        targets = listed(map(repr, targets))
    return (
        f"hybrid_adapter.target_modules: {targets} matches no module of"
        f" {type(model).__name__}; its linear layers are called"
        f" {listed(suffixes, limit=40) or '(it has none)'}"
    )
