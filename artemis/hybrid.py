"""The verbs on a model: add the hybrid adapter, load it, switch it off, take it out."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from .config import HybridAdapterConfig
from .errors import AdapterError
from .fusing import check_unfusable, fuse_model, is_fused, unfuse_model
from .initialization import start_from_weights
from .injection import check_free, check_removable, eject, inject
from .interchange import adopt, holds_lora, read_files
from .layers.bank import find_bank
from .merging import check_unmerged, merge_adapter, unmerge_adapter
from .plan import Plan
from .report import print_trainable_parameters
from .saving.adapter_file import read_adapter
from .saving.checkpoint import check_for_base, load_adapter_parameters, save_adapter_parameters
from .saving.fit import check_tensors
from .saving.state import copy_tensors
from .targets import make_plan
from .wrappers import check_bare


def add_hybrid_adapter_to_model(model: nn.Module, config: HybridAdapterConfig) -> nn.Module:
    """Add the adapter that `config` describes to `model`, in place, and return the model.

    The base is frozen; the adapter, and the heads of a classification model, train. The model
    computes what it did before, until it is trained. It gains the methods save_adapter_parameters,
    load_adapter_parameters, merge_adapter, unmerge_adapter, disable_adapter, remove_adapter and
    print_trainable_parameters. With `enabled: false` the model is returned as it is. Parameters are
    drawn from torch's generator. With `fuse_model: true` the base is fused as well, which changes
    its results by rounding.

    Raises `AdapterError` before anything is changed: nothing matches, a target is no linear layer,
    the model has an adapter already, ...
    """
    check_bare(model)
    if not isinstance(config, HybridAdapterConfig):
        raise AdapterError(
            f"got {config!r} as config, allowed: a HybridAdapterConfig (from_yaml, from_dict)"
        )
    config = HybridAdapterConfig.from_dict(config.to_dict())  # checked, and the model's own copy
    if not config.enabled:
        return model
    check_free(model)
    bank = inject(model, config, make_plan(model, config))
    bank.reset_parameters()
    if config.init == "svd":
        start_from_weights(model, bank)
    return _complete(model)


def load_hybrid_adapter(
    base_model: nn.Module, path: str | os.PathLike, *, strict: bool = False
) -> nn.Module:
    """Add the adapter saved at `path`, configuration and parameters; return the model.

    Raises `FileNotFoundError` or `AdapterError` (a damaged file, another class or size of base...)
    and changes nothing then. Another name or other weights of the base give one warning, or with
    `strict` an error.
    """
    check_bare(base_model)
    check_free(base_model)
    if holds_lora(path):
        raise AdapterError(f"{path}: an adapter of PEFT's; load_peft_adapter loads it")
    file = read_adapter(path)
    tensors = check_for_base(base_model, file, strict)
    return _with_adapter(base_model, file.config, file.plan, tensors)


def load_peft_adapter(
    base_model: nn.Module, path: str | os.PathLike, *, shared_parameters: bool = False
) -> nn.Module:
    """Add the LoRA adapter that PEFT saved in the folder `path`; return the model.

    It computes what PEFT's model does, trains on, and is saved as an adapter of ours. The factor of
    most modules is `scaling_factor`; others have theirs within B.

    Args:
        base_model: the model that PEFT had adapted, of the same class; changed in place.
        path: a folder with `adapter_config.json` and `adapter_model.safetensors`.
        shared_parameters: hold one A for all modules of a name and shape, where the files do.

    Raises `FileNotFoundError` or `AdapterError` (no such module, another shape, a method that is
    more than LoRA, ...) and changes nothing then.
    """
    check_bare(base_model)
    check_free(base_model)
    adopted = adopt(base_model, read_files(path), shared_parameters)
    check_tensors(base_model, adopted.plan.heads, adopted.tensors, path)
    return _with_adapter(base_model, adopted.config, adopted.plan, adopted.tensors)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within it, the model computes as its base does (heads keep what they learned).

    Raises `AdapterError` where the adapter is merged.
    """
    bank = find_bank(model)
    check_unmerged(model)
    before, bank.enabled = bank.enabled, False
    try:
        yield
    finally:
        bank.enabled = before


def remove_adapter(model: nn.Module) -> None:
    """Take the adapter out: classes, weights and `requires_grad` of the base are as before.

    A merged adapter is unmerged first, and what `fuse_model: true` fused is unfused. Heads keep
    what they learned: they were trained in place. Modules that were put in the place of adapted
    ones stay as they are. Raises `AdapterError`, before anything is changed, where modules carry a
    forward of their own by now.
    """
    check_removable(model)
    fused = find_bank(model).fused_model
    if fused:
        check_unfusable(model)
    unmerge_adapter(model)
    eject(model)
    if fused:
        unfuse_model(model)
    for name in _METHODS:
        delattr(model, name)


_METHODS = {
    function.__name__: function
    for function in (
        save_adapter_parameters,
        load_adapter_parameters,
        merge_adapter,
        unmerge_adapter,
        disable_adapter,
        remove_adapter,
        print_trainable_parameters,
    )
}


def _with_adapter(
    model: nn.Module,
    config: HybridAdapterConfig,
    plan: Plan,
    tensors: Mapping[str, torch.Tensor],
) -> nn.Module:
    """`model` with an adapter and heads of `tensors`, which were checked."""
    inject(model, config, plan)
    copy_tensors(model, plan.heads, tensors)
    return _complete(model)


def _complete(model: nn.Module) -> nn.Module:
    """`model`, which has its bank, with the adapter's methods, and fused where that is wanted.

    As partials in the instance: its class stays the very class that transformers looks up by name
    and identity, and, unlike bound methods, partials pickle and follow a deepcopy to the copy.
    """
    for name, function in _METHODS.items():
        setattr(model, name, partial(function, model))
    bank = find_bank(model)
    if bank.config.fuse_model and not any(map(is_fused, model.modules())):
        fuse_model(model)
        bank.fused_model = True
    return model
