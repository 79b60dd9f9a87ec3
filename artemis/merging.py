"""Folding the adapter into the base's weights, and the way back, bit for bit."""

from dataclasses import dataclass

import torch
from torch import nn

from .errors import AdapterError, listed
from .layers.adapted import adapted_module, check_in_place
from .layers.bank import find_bank
from .layers.linear import weight_of
from .layers.packed import is_packed
from .layers.sites import Site
from .layers.sources import is_at_hand


@dataclass(frozen=True)
class MergeReport:
    """What `merge_adapter` did: paths now folded into weights, and path -> why it stays active."""

    merged: tuple[str, ...]
    active: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"{len(self.merged)} modules folded into the base, {len(self.active)} still active"
        ]
        lines += [f"  {path}: {reason}" for path, reason in self.active.items()]
        return "\n".join(lines)


@torch.no_grad()
def merge_adapter(model: nn.Module) -> MergeReport:
    """Fold into the base's weights what can be folded; the rest stays active.

    LoRA folds into any weight that is the layer's alone and a parameter of it (pruning and weight
    norms work the weight out at each forward); a bottleneck only with the identity as its
    activation, and, if it has biases, on a layer that has one, its alone too. The originals are
    kept on the CPU for `unmerge_adapter`. Sums are formed in at least fp32 and rounded once.
    Merging what is merged changes nothing.

    Raises `AdapterError`, before anything is changed, where the adapter is switched off or an
    adapted module was replaced.
    """
    bank = find_bank(model)
    if not bank.enabled:
        raise AdapterError(
            "the adapter is switched off; leave `with model.disable_adapter()` before merging"
        )
    check_in_place(model, bank.sites.values())
    active = {}
    for path, site in bank.sites.items():
        if site.original:
            continue
        module = adapted_module(model, site)
        reason = _why_not(model, module, site)
        if reason:
            active[path] = reason
        else:
            bank.mark_merged(True)
            _fold(module, site)
    return MergeReport(tuple(path for path in bank.sites if path not in active), active)


@torch.no_grad()
def unmerge_adapter(model: nn.Module) -> None:
    """Put the base's own weights back, bit for bit; the adapter is active again.

    Raises `AdapterError`, before anything is changed, where they have no place any more.
    """
    bank = find_bank(model)
    merged = [site for site in bank.sites.values() if site.original]
    places = [_parameters(model, site) for site in merged]
    lost = [site.spec.path for site, place in zip(merged, places, strict=True) if place is None]
    if lost:
        raise AdapterError(
            f"{listed(lost)}: replaced, pruned, normed, parametrized or offloaded since the adapter"
            " was merged, so that the base's own weight cannot be put back; undo that first"
        )
    for site, place in zip(merged, places, strict=True):
        for name, tensor in site.original.items():
            place[name].copy_(tensor)
        site.original = None
    bank.mark_merged(False)


def _parameters(model: nn.Module, site: Site) -> dict[str, nn.Parameter] | None:
    """Where the parameters that folding changed are; None: they are not there any more."""
    module = adapted_module(model, site)
    known = module is not None and site.original.keys() <= module._parameters.keys()
    known = known and all(is_at_hand(module._parameters[name]) for name in site.original)
    return module._parameters if known else None


def is_merged(model: nn.Module) -> bool:
    """Whether any module's weight holds its adapter now."""
    return any(site.original for site in find_bank(model).sites.values())


def check_unmerged(model: nn.Module) -> None:
    """Raise `AdapterError` where the base's weights hold an adapter now."""
    if find_bank(model) is not None and is_merged(model):
        raise AdapterError("the adapter is merged into the base; call unmerge_adapter() first")


def _why_not(model: nn.Module, module: nn.Module, site: Site) -> str | None:
    if site.spec.kind == "block":
        return "it acts on the output of a whole block"
    if not is_at_hand(module._parameters.get("weight")):
        return "its weight is brought for each call (offloaded, or sharded)"
    if is_packed(module):
        return f"the weight is quantized ({module.packing.format}): folding would round it again"
    if not module.weight.is_floating_point():
        return f"the weight is {module.weight.dtype}"
    reason = _taken(model, module, site, "weight")
    if reason:
        return reason
    if site.spec.kind == "bottleneck":
        config = site.bank.config
        if config.activation != "identity":
            return f"a bottleneck with {config.activation} is not linear"
        if config.adapter_bias and module.bias is None:
            return "the bottleneck has biases and the layer has none to take them"
        if module.bias is not None:
            return _taken(model, module, site, "bias")
    return None


def _taken(model: nn.Module, module: nn.Module, site: Site, name: str) -> str | None:
    """Why the layer's weight or bias is not its own to change, or None."""
    if name not in module._parameters:
        return f"the {name} is worked out at each forward (pruned, normed or parametrized)"
    tensor = module._parameters[name]
    for other, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is tensor and other != f"{site.spec.path}.{name}":
            return f"the {name} is tied to {other}"
    return None


def _fold(module: nn.Module, site: Site) -> None:
    weight = weight_of(module)
    new_weight, new_bias = _folded(site, weight, module.bias)
    changed = ["weight"] if new_bias is None else ["weight", "bias"]
    # Cloned: `.cpu()` of a tensor on the CPU is that tensor.
    site.original = {n: module._parameters[n].detach().cpu().clone() for n in changed}
    weight.copy_(new_weight)
    if new_bias is not None:
        module.bias.copy_(new_bias)


def _folded(
    site: Site, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (out, in) and bias that compute, alone, what the site does."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    tensors = {role: t.to(wide) for role, t in site.tensors().items()}
    scale = site.factor * tensors.get("gain", 1.0)
    w = weight.to(wide)
    if site.spec.kind == "lora":
        return w + scale * (tensors["lora_b"] @ tensors["lora_a"]), None
    down, up = tensors["down"], tensors["up"]
    # y = y0 + s·(U (D y0 + b_d) + b_u), where y0 = W x + b
    w = w + scale * (up @ (down @ w))
    if bias is None:
        return w, None
    b = bias.to(wide)
    hidden = down @ b
    shift = up @ hidden
    if site.bank.config.adapter_bias:
        shift = up @ (hidden + tensors["bias_down"]) + tensors["bias_up"]
    return w, b + scale * shift
