"""What keeps an adapter file from fitting a model, one sentence each; nothing is changed."""

import os
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from .. import architectures
from ..config import HybridAdapterConfig
from ..errors import AdapterError, listed
from ..layers.bank import BANK
from ..layers.linear import linear_features
from ..plan import Plan, SiteSpec
from .state import adapter_state

#: Settings that change what the parameters mean; the others may differ from the file's.
_MEANING = ("shared_parameters", "scaling_factor", "adapter_scale", "activation", "adapter_bias")


def site_problems(model: nn.Module, plan: Plan) -> Iterator[str]:
    """What `plan`, a file's, finds missing or of another size in the base `model`."""
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


def plan_problems(own: Plan, other: Plan) -> Iterator[str]:
    """What a model's plan has otherwise than a file's: modules, ranks, heads."""
    mine = {site.path: site for site in own.sites}
    theirs = {site.path: site for site in other.sites}
    for path in [*mine, *(path for path in theirs if path not in mine)]:
        if path not in mine or path not in theirs:
            yield f"{path} is adapted only in the {'file' if path in theirs else 'model'}"
        elif mine[path] != theirs[path]:
            yield f"{path} has {_in_words(mine[path])}, in the file {_in_words(theirs[path])}"
    if set(own.heads) != set(other.heads):
        yield f"the trained heads are {listed(own.heads)}, in the file {listed(other.heads)}"


def config_problems(own: HybridAdapterConfig, other: HybridAdapterConfig) -> Iterator[str]:
    """The same of what gives the parameters their meaning."""
    for name in _MEANING:
        if getattr(own, name) != getattr(other, name):
            yield f"{name} is {getattr(own, name)!r}, in the file {getattr(other, name)!r}"


def tensor_problems(
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


def check_tensors(
    model: nn.Module,
    heads: tuple[str, ...],
    tensors: Mapping[str, torch.Tensor],
    path: str | os.PathLike,
) -> None:
    """Raise `AdapterError` where `tensors`, from `path`, do not fit the heads of `model`."""
    problems = list(tensor_problems(model, heads, tensors))
    if problems:
        raise AdapterError(f"{path} does not fit the model: {listed(problems)}")


def _in_words(site: SiteSpec) -> str:
    return f"{site.kind} {site.size} on {site.in_features}x{site.out_features} ({site.target})"
