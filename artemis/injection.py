"""Putting the adapter into a model and taking it out again, by class and in place."""

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import architectures
from .config import HybridAdapterConfig
from .errors import AdapterError, listed
from .fusing import is_fused
from .layers.adapted import adapt, has_own_forward, restore
from .layers.bank import BANK, AdapterBank, find_bank
from .layers.blocks import BlockSite
from .layers.groups import InputGroup, Shelf
from .layers.linear import has_own_tensors, linear_features
from .layers.norms import hold_statistics, release_statistics
from .layers.output_head import freeze_head, hang_hooks, thaw_head
from .layers.packed import packed_modules
from .layers.packed_linear import LayerWeight
from .layers.seeds import SharedSeed
from .layers.sites import BottleneckSite, LoRASite
from .plan import Plan, SiteSpec
from .saving.identity import facts

_SITES = {"lora": LoRASite, "bottleneck": BottleneckSite, "block": BlockSite}


def inject(model: nn.Module, config: HybridAdapterConfig, plan: Plan) -> AdapterBank:
    """Adapt the modules of `plan`, freeze the base, and return the bank, its tensors still zero.

    Every check comes first: on `AdapterError` the model is as it was.
    """
    _check_injection(model, plan)
    bank = AdapterBank(config, plan)
    bank.base = facts(model)
    weight = _weights(model, plan.sites[0])[0]
    bank.to(weight.device, weight.dtype if config.adapter_dtype == "model" else torch.float32)
    seeds = _seeds(config, plan)
    for spec in plan.sites:
        site = _SITES[spec.kind](spec, bank, seeds[spec.path])
        bank.sites[spec.path] = site
        module = model.get_submodule(spec.path)
        if spec.kind == "block":
            site.hook = module.register_forward_hook(site)
        else:
            adapt(module, site)
    _group(model, plan)
    _freeze(model, bank)
    hold_statistics(model, bank.heads)
    bank.head_hooks = hang_hooks(model)
    if config.impl != "reference":  # whose derivatives are torch's, of every order
        freeze_head(model)
    model.add_module(BANK, bank)
    return bank


def eject(model: nn.Module) -> None:
    """Undo `inject`: classes, hooks, norms and `requires_grad`; heads keep what they learned.

    Modules are known by their site, not by their path, where another may stand by now.
    """
    bank = find_bank(model)
    for module in _adapted(model).values():
        restore(module)
    for site in bank.sites.values():
        if site.spec.kind == "block":
            site.hook.remove()
    for hook in bank.head_hooks:
        hook.remove()
    thaw_head(model)
    delattr(model, BANK)
    release_statistics(model)
    trained = set(bank.trained_before)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def check_removable(model: nn.Module) -> None:
    """Raise `AdapterError` where a forward of their own would go on calling the adapter."""
    held = [path for path, module in _adapted(model).items() if has_own_forward(module)]
    if held:
        raise AdapterError(
            f"{listed(held)}: each carries a forward of its own since the adapter was added (as"
            " accelerate's dispatch_model sets it), which would go on calling the adapter; take"
            " that off first (accelerate.hooks.remove_hook_from_submodules)"
        )


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> each linear layer that has an adapter of the model's, wherever it stands."""
    sites = {id(site) for site in find_bank(model).sites.values()}
    modules = model.named_modules()
    return {path: module for path, module in modules if id(vars(module).get("adapter")) in sites}


def check_free(model: nn.Module) -> None:
    """Raise `AdapterError` where `model` has an adapter, or something else by the bank's name."""
    if hasattr(model, BANK):
        raise AdapterError(
            f"{type(model).__name__} has a hybrid adapter already; remove_adapter() takes it out"
        )


def _check_injection(model: nn.Module, plan: Plan) -> None:
    """Raise `AdapterError` where the modules of `plan` cannot be adapted as they stand."""
    check_free(model)
    _check_loaded(model)
    for spec in plan.sites:
        module = model.get_submodule(spec.path)
        if "forward" in vars(module) and not is_fused(module):
            raise AdapterError(
                f"{spec.path} carries a forward of its own (as accelerate sets it for a device_map"
                " of several devices, and for offloading), which would bypass the adapter; allowed:"
                " a model on one device, without offloading"
            )
        if spec.kind != "block":
            _check_weight(spec.path, *_weights(model, spec))
    devices = {p.device for spec in plan.sites for p in _weights(model, spec)}
    if len(devices) > 1:
        raise AdapterError(
            f"the adapted modules lie on several devices ({', '.join(map(str, devices))}); allowed:"
            " one, since the bank that they share is on one"
        )
    for head in plan.heads:
        _check_head(model, head)


def _check_loaded(model: nn.Module) -> None:
    """Refuse a base without values, except where nothing is to have any: `torch.device("meta")`."""
    names = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if names and torch.get_default_device().type != "meta":
        raise AdapterError(
            f"{listed(names)}: on the meta device, not loaded yet or offloaded; load the weights"
            " before, and offload after the adapter was added"
        )


def _check_weight(path: str, weight: torch.Tensor | LayerWeight) -> None:
    """Refuse a tensor that stands for others: its numbers are not where operations read them.

    A DTensor passes: at the layer's call FSDP has put a plain tensor in its place.
    """
    if is_traceable_wrapper_subclass(weight) and not hasattr(weight, "placements"):
        raise AdapterError(
            f"the weight of {path} is a {type(weight).__name__} (as torchao's quantization makes"
            " it), allowed: a plain tensor; quantize_adapter_model holds a base in 8 or 4 bits"
        )


def _check_head(model: nn.Module, head: str) -> None:
    module = model.get_submodule(head)
    own = {id(p) for p in module.parameters()}
    if not own:
        raise AdapterError(f"modules_to_save: {head} has no parameters to train")
    packed = [".".join(filter(None, (head, path))) for path, _ in packed_modules(module)]
    if packed:
        raise AdapterError(
            f"modules_to_save: {head} is packed ({listed(packed)}), and so cannot train; add the"
            " adapter before quantizing, or have quantize_adapter_model leave it"
        )
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in own and not name.startswith(f"{head}."):
            raise AdapterError(
                f"modules_to_save: {head} shares a tensor with the base ({name}), which must not"
                " change; untie them, or leave it out"
            )


def _weights(model: nn.Module, spec: SiteSpec) -> list[torch.Tensor | LayerWeight]:
    """The weights that `spec` adapts: the layer's own, or those of the block's linear layers.

    A block without any has its parameters, as experts do. Where a hook makes the weight of
    parameters at each forward (pruning, weight norms), one of those stands for it: the weight
    itself is as the last forward left it, wherever the model is.
    """
    module = model.get_submodule(spec.path)
    layers = [m for m in module.modules() if linear_features(m)]
    if not layers:
        return [p for p in module.parameters() if p.is_floating_point()]
    return [
        layer.weight if has_own_tensors(layer) else next(layer.parameters()) for layer in layers
    ]


def _seeds(config: HybridAdapterConfig, plan: Plan) -> dict[str, SharedSeed]:
    """Module path -> seed: one for all that read the same tensor with the same kind of adapter."""
    if config.dropout_mask_sharing == "module":
        return {spec.path: SharedSeed() for spec in plan.sites}
    groups: dict[tuple, SharedSeed] = {}
    return {spec.path: groups.setdefault(_reads(spec), SharedSeed()) for spec in plan.sites}


def _reads(spec: SiteSpec) -> tuple[str, str, int]:
    """Equal for modules that read the same tensor with the same kind of adapter."""
    return architectures.input_of(spec.path), spec.kind, spec.in_features


def _group(model: nn.Module, plan: Plan) -> None:
    """Let linear layers that read the same tensor with the same kind of adapter find each other."""
    readers: dict[tuple, list[nn.Module]] = {}
    for spec in plan.sites:
        if spec.kind != "block":
            readers.setdefault(_reads(spec), []).append(model.get_submodule(spec.path))
    shelf = Shelf()
    for modules in readers.values():
        if len(modules) > 1:
            group = InputGroup(shelf)
            for module in modules:
                group.add(module)


def _freeze(model: nn.Module, bank: AdapterBank) -> None:
    """Let heads train and nothing else of the base; remember what did before."""
    named = list(model.named_parameters())
    bank.trained_before = tuple(name for name, parameter in named if parameter.requires_grad)
    for _, parameter in named:
        parameter.requires_grad_(False)
    for head in bank.heads:
        for parameter in model.get_submodule(head).parameters():
            parameter.requires_grad_(True)
