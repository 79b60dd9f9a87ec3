"""Saving a model's adapter and loading it back; everything is compared before anything changes."""

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from .. import architectures
from ..config import HybridAdapterConfig
from ..errors import AdapterError, listed
from ..layers.adapted import replaced
from ..layers.bank import BANK, MERGED, check_writable, find_bank
from ..layers.linear import linear_features
from ..layers.sources import is_at_hand
from ..merging import check_unmerged
from ..plan import Plan, SiteSpec
from .adapter_file import AdapterFile, read_adapter, write_adapter
from .identity import identify

#: Settings that change what the parameters mean; the others may differ from the file's.
_MEANING = ("shared_parameters", "scaling_factor", "adapter_scale", "activation", "adapter_bias")


def save_adapter_parameters(model: nn.Module, path: str | os.PathLike) -> None:
    """Save the adapter, and the heads that train, into the directory `path`, made where missing.

    Replaces `hybrid_adapter.safetensors` and `hybrid_adapter_config.json` there and touches nothing
    else. Killed at any moment, it leaves the old adapter or the new one. Merged or not, the same is
    saved. Warns where an adapted module was replaced, and of what else of the base trains.
    """
    bank = find_bank(model)
    check_writable(bank, "saved")
    problem = replaced(model, bank.sites.values())
    if problem is not None:
        warnings.warn(f"{problem}; saved is what it was", stacklevel=2)
    if names := trained_and_not_saved(model):
        warnings.warn(
            f"{listed(names)}: not saved, although they train; name their modules in"
            " modules_to_save, or save them apart",
            stacklevel=2,
        )
    plan = bank.plan()
    tensors, base = adapter_state(model, plan.heads), identify(model, plan.heads)
    write_adapter(Path(path), tensors, bank.config, plan, base)


def trained_and_not_saved(model: nn.Module) -> list[str]:
    """Names of the parameters that require a gradient and are no part of an adapter file."""
    bank = find_bank(model)
    saved = {
        id(parameter)
        for module in (bank, *map(model.get_submodule, bank.heads))
        for parameter in module.parameters()
    }
    return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in saved]


def load_adapter_parameters(
    model: nn.Module, path: str | os.PathLike, *, strict: bool = False
) -> None:
    """Load what `save_adapter_parameters` saved into the adapter that `model` has.

    Floating dtypes are cast. Raises `AdapterError` listing what differs: the base's class or size,
    adapted modules, ranks, settings that change the meaning. Another name or other weights of the
    base give one warning, or with `strict` an error.
    """
    check_unmerged(model)
    check_writable(find_bank(model), "loaded into")
    file = read_adapter(path)
    copy_tensors(model, file.plan.heads, _check_for_adapter(model, file, strict))


def check_for_base(model: nn.Module, file: AdapterFile, strict: bool) -> dict[str, torch.Tensor]:
    """Check that `file` fits the base `model`, which has no adapter; return the file's tensors."""
    return _checked(model, file, list(_site_problems(model, file.plan)), strict)


def _check_for_adapter(
    model: nn.Module, file: AdapterFile, strict: bool
) -> dict[str, torch.Tensor]:
    """Check that `file` fits the adapter that `model` has; return the file's tensors."""
    bank = find_bank(model)
    problems = list(_config_problems(bank.config, file.config))
    problems += _plan_problems(bank.plan(), file.plan)
    return _checked(model, file, problems, strict)


@torch.no_grad()
def copy_tensors(
    model: nn.Module, heads: tuple[str, ...], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Copy checked tensors into the adapter and the heads of `model`."""
    for name, target in adapter_state(model, heads).items():
        target.copy_(tensors[name])


def _checked(
    model: nn.Module, file: AdapterFile, problems: list[str], strict: bool
) -> dict[str, torch.Tensor]:
    base = identify(model, file.plan.heads)
    if base.class_name != file.base.class_name:
        problems.append(f"the base is a {base.class_name}, the file's a {file.base.class_name}")
    if base.parameters != file.base.parameters:
        problems.append(
            f"the base has {base.parameters:,} parameters, the file's {file.base.parameters:,}"
        )
    doubts = []
    if base.name != file.base.name and base.name and file.base.name:
        doubts.append(f"the base is called {base.name!r}, the file's {file.base.name!r}")
    if not base.same_weights(file.base):
        doubts.append("the base's weights are not those that the adapter was trained on")
    tensors = {}
    if not problems:
        tensors = file.load()
        problems = list(_tensor_problems(model, file.plan.heads, tensors))
    if strict:
        problems += doubts
    if problems:
        raise AdapterError(f"{file.path} does not fit the model: {listed(problems)}")
    if doubts:
        # Attributed to who called load_hybrid_adapter or load_adapter_parameters.
        warnings.warn(f"{file.path}: {'; '.join(doubts)}", stacklevel=4)
    return tensors


def check_tensors(
    model: nn.Module,
    heads: tuple[str, ...],
    tensors: Mapping[str, torch.Tensor],
    path: str | os.PathLike,
) -> None:
    """Raise `AdapterError` where `tensors`, from `path`, do not fit the heads of `model`."""
    problems = list(_tensor_problems(model, heads, tensors))
    if problems:
        raise AdapterError(f"{path} does not fit the model: {listed(problems)}")


def adapter_state(model: nn.Module, heads: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """What an adapter file holds of `model.state_dict()`: the model's own tensors.

    A tensor that a head holds under several names is there under the first. `AdapterError` where
    one is sharded or offloaded.
    """
    bank = find_bank(model)
    state = {} if bank is None else dict(bank.state_dict(prefix=f"{BANK}."))
    state.pop(f"{BANK}.{MERGED}", None)  # says something of the base
    for head in heads:
        own = model.get_submodule(head).state_dict(prefix=f"{head}.", keep_vars=True)
        first = {id(tensor): name for name, tensor in reversed(own.items())}
        state.update((name, t) for name, t in own.items() if first[id(t)] == name)
    if away := [name for name, tensor in state.items() if not is_at_hand(tensor)]:
        raise AdapterError(
            f"{listed(away)}: sharded over processes, or offloaded; bring it back first (from FSDP:"
            " load the full state dict into such a model on one device)"
        )
    return state


def _tensor_problems(
    model: nn.Module, heads: tuple[str, ...], tensors: Mapping[str, torch.Tensor]
) -> Iterator[str]:
    """What keeps `tensors` from being copied; the bank's shapes were compared with the plan's."""
    targets = adapter_state(model, heads)
    given = {name for name in tensors if name in targets or not name.startswith(f"{BANK}.")}
    for name in sorted(given | targets.keys()):
        if name not in targets or name not in tensors:
            yield f"{name} is only in the {'file' if name in tensors else 'model'}"
        elif targets[name].shape != tensors[name].shape:
            yield (
                f"{name} has shape {tuple(targets[name].shape)}, in the file"
                f" {tuple(tensors[name].shape)}"
            )
    for name, tensor in tensors.items():
        floating = targets[name].is_floating_point() if name in targets else True
        if tensor.is_floating_point() != floating:
            yield f"{name} is {tensor.dtype} in the file"


def _config_problems(own: HybridAdapterConfig, other: HybridAdapterConfig) -> Iterator[str]:
    for name in _MEANING:
        if getattr(own, name) != getattr(other, name):
            yield f"{name} is {getattr(own, name)!r}, in the file {getattr(other, name)!r}"


def _plan_problems(own: Plan, other: Plan) -> Iterator[str]:
    mine = {site.path: site for site in own.sites}
    theirs = {site.path: site for site in other.sites}
    for path in [*mine, *(path for path in theirs if path not in mine)]:
        if path not in mine or path not in theirs:
            yield f"{path} is adapted only in the {'file' if path in theirs else 'model'}"
        elif mine[path] != theirs[path]:
            yield f"{path} has {_in_words(mine[path])}, in the file {_in_words(theirs[path])}"
    if set(own.heads) != set(other.heads):
        yield f"the trained heads are {listed(own.heads)}, in the file {listed(other.heads)}"


def _site_problems(model: nn.Module, plan: Plan) -> Iterator[str]:
    modules = dict(model.named_modules())
    for head in plan.heads:
        if head not in modules:
            yield f"the model has no head {head}"
    for site in plan.sites:
        module = modules.get(site.path)
        if module is None:
            yield f"the model has no {site.path}"
            continue
        if site.kind == "block":
            hidden = architectures.hidden_size(model, site.path)
            have = (hidden, hidden) if architectures.is_block(module) else None
        else:
            have = linear_features(module)
        if have != (site.in_features, site.out_features):
            what = "x".join(map(str, have)) if have else f"a {type(module).__name__}"
            yield f"{site.path} is {what}, in the file {site.in_features}x{site.out_features}"


def _in_words(site: SiteSpec) -> str:
    return f"{site.kind} {site.size} on {site.in_features}x{site.out_features} ({site.target})"
