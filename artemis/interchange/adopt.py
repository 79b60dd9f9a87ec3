"""What PEFT's files of a LoRA adapter come to here: a configuration, a plan, and its tensors."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..config import HybridAdapterConfig
from ..errors import AdapterError, listed, nearest
from ..layers.bank import BANK, site_tensors
from ..layers.linear import linear_features
from ..paths import is_within, leaf_of
from ..plan import Plan
from ..targets import make_plan, matching
from .files import SETTINGS_FILE, LoRAFiles

#: Settings under which the tensors are not all, or stand for another formula.
_OTHER_METHODS = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "target_parameters",
    "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config", "velora_config",
)  # fmt: skip
#: Starts of `init_lora_weights` that took something out of the base's weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Adopted:
    """An adapter read from PEFT's files, named as in an adapter file of our own."""

    config: HybridAdapterConfig
    plan: Plan
    tensors: dict[str, torch.Tensor]


def adopt(model: nn.Module, files: LoRAFiles, shared: bool = False) -> Adopted:
    """Find the modules of `model` that `files` are about; nothing is changed.

    Modules of another factor than most have theirs within B. `shared`: one A for all modules of a
    name and shape, which must be one in the files.

    Raises `AdapterError` where they do not fit: no such module, another shape, a setting that is
    another method than LoRA.
    """
    _check_method(files)
    _check_modules(model, files)
    heads = _heads(model, files)
    factors = {path: _factor(files, path, len(a)) for path, (a, _) in files.lora.items()}
    factor = Counter(factors.values()).most_common(1)[0][0]
    config = _config(model, files, factor, heads, shared)
    ranks = {path: len(a) for path, (a, _) in files.lora.items()}
    plan = make_plan(model, config)
    if lost := files.lora.keys() - {site.path for site in plan.sites}:
        raise AdapterError(
            f"{files.path}: {listed(sorted(lost))}: LoRA within a module that is saved whole"
        )
    plan = Plan(tuple(replace(site, size=ranks[site.path]) for site in plan.sites), plan.heads)
    tensors = dict(files.others)
    for site in plan.sites:
        a, b = files.lora[site.path]
        if factors[site.path] != factor:
            wide = torch.promote_types(b.dtype, torch.float32)
            b = (b.to(wide) * (factors[site.path] / factor)).to(b.dtype)
        given = {"lora_a": a, "lora_b": b, "gain": torch.ones(())}
        for role, (key, _) in site_tensors(site, config).items():
            name = f"{BANK}.{role}.{key}"
            tensors[name] = _joined(site.path, tensors.get(name), given[role])
    return Adopted(config, plan, tensors)


def _joined(path: str, known: torch.Tensor | None, given: torch.Tensor) -> torch.Tensor:
    """One tensor for all that use the first rows of it."""
    if known is None:
        return given
    short, long = sorted((known, given), key=len)
    if not torch.equal(short, long[: len(short)]):
        raise AdapterError(
            f"shared_parameters: got True, allowed: False, since A of {path} is another than that"
            " of the modules of its name before it"
        )
    return long


def _config(
    model: nn.Module, files: LoRAFiles, factor: float, heads: tuple[str, ...], shared: bool
) -> HybridAdapterConfig:
    names = tuple(dict.fromkeys(map(leaf_of, files.lora)))
    others = [path for path, _ in model.named_modules() if matching(names, path)]
    return HybridAdapterConfig.from_dict(
        {
            "lora_rank": Counter(len(a) for a, _ in files.lora.values()).most_common(1)[0][0],
            "target_modules": names,
            "apply_lora_to": names,
            "exclude_modules": [path for path in others if path not in files.lora],
            "lora_dropout": files.settings.get("lora_dropout", 0.0),
            "scaling_factor": factor,
            "shared_parameters": shared,
            "modules_to_save": heads,
        }
    )


def _check_method(files: LoRAFiles) -> None:
    settings, path = files.settings, files.path / SETTINGS_FILE
    for name in _OTHER_METHODS:
        if settings.get(name):
            raise AdapterError(
                f"{path}: {name}: got {settings[name]!r}, allowed: none (plain LoRA)"
            )
    if settings.get("bias", "none") != "none":
        raise AdapterError(
            f"{path}: bias: got {settings['bias']!r}, allowed: 'none' (the base does not change)"
        )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{path}: init_lora_weights: got {start!r}, which changed the base's weights; have PEFT"
            " save the adapter with path_initial_model_for_weight_conversion"
        )


def _check_modules(model: nn.Module, files: LoRAFiles) -> None:
    problems = list(_problems(model, files))
    if problems:
        raise AdapterError(
            f"{files.path} does not fit the {type(model).__name__}: {listed(problems)}"
        )


def _problems(model: nn.Module, files: LoRAFiles) -> Iterator[str]:
    modules = dict(model.named_modules())
    for path, (a, b) in files.lora.items():
        if path not in modules:
            yield f"there is no {path}{nearest(path, modules)}"
            continue
        have = linear_features(modules[path])
        if have is None:
            yield f"{path} is a {type(modules[path]).__name__}, and no linear layer"
        elif have != (a.shape[1], b.shape[0]):
            yield f"{path} is {have[0]}x{have[1]}, in the file {a.shape[1]}x{b.shape[0]}"


def _heads(model: nn.Module, files: LoRAFiles) -> tuple[str, ...]:
    """Paths of the modules that the files hold whole; every other tensor must be one of theirs."""
    names = tuple(files.settings.get("modules_to_save") or ())
    heads = tuple(
        path
        for path, _ in model.named_modules()
        if matching(names, path) and any(is_within(name, (path,)) for name in files.others)
    )
    foreign = [name for name in files.others if not is_within(name, heads)]
    if foreign:
        raise AdapterError(
            f"{files.path}: holds {listed(foreign)}, allowed: LoRA of linear layers, and modules"
            " named in modules_to_save"
        )
    return heads


def _factor(files: LoRAFiles, path: str, rank: int) -> float:
    """alpha / rank of a module, or alpha / √rank where the settings say so."""
    settings = files.settings
    stated = _of_pattern(settings.get("rank_pattern"), path, settings.get("r", rank))
    alpha = _of_pattern(settings.get("alpha_pattern"), path, settings.get("lora_alpha", 8))
    if stated != rank:
        raise AdapterError(
            f"{files.path}: A of {path} has {rank} rows, and its settings say rank {stated}"
        )
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise AdapterError(f"{files.path}: alpha of {path}: got {alpha!r}, allowed: a number")
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _of_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first pattern that matches `path` or the end of it, as PEFT takes them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
