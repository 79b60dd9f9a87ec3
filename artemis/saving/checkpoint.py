"""Saving a model's adapter and loading it back; everything is compared before anything changes."""

import os
import warnings
from pathlib import Path

import torch
from torch import nn

from ..errors import AdapterError, listed
from ..layers.adapted import replaced
from ..layers.bank import check_writable, find_bank
from ..merging import check_unmerged
from .adapter_file import AdapterFile, read_adapter, write_adapter
from .fit import config_problems, plan_problems, site_problems, tensor_problems
from .identity import identify
from .state import adapter_state, copy_tensors


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
    return _checked(model, file, list(site_problems(model, file.plan)), strict)


def _check_for_adapter(
    model: nn.Module, file: AdapterFile, strict: bool
) -> dict[str, torch.Tensor]:
    """Check that `file` fits the adapter that `model` has; return the file's tensors."""
    bank = find_bank(model)
    problems = list(config_problems(bank.config, file.config))
    problems += plan_problems(bank.plan(), file.plan)
    return _checked(model, file, problems, strict)


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
        problems = list(tensor_problems(model, file.plan.heads, tensors))
    if strict:
        problems += doubts
    if problems:
        raise AdapterError(f"{file.path} does not fit the model: {listed(problems)}")
    if doubts:
        # Attributed to who called load_hybrid_adapter or load_adapter_parameters.
        warnings.warn(f"{file.path}: {'; '.join(doubts)}", stacklevel=4)
    return tensors
