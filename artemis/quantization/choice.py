"""What to pack: options and model in, checked layers out; nothing is changed."""

import re
from collections.abc import Iterator

import torch
from torch import nn

from .. import architectures
from ..errors import AdapterError, listed
from ..experts import is_experts, matrices_of, stack_of
from ..layers.adapted import PACKED
from ..layers.bank import find_bank
from ..layers.linear import is_linear, weight_of
from ..layers.packed import is_packed, packed_modules
from ..merging import check_unmerged
from ..paths import is_within, owner_of
from ..wrappers import check_bare
from .begun import begun
from .options import Options

_LEAST_GROUP = 8
_KEPT = "transformers keeps it in float32, beside 16 bits, for its range"


def choose_layers(
    model: nn.Module, options: Options
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers, and modules of experts, to pack by path; of all other matrices path -> reason.

    Raises `AdapterError` where the model as a whole, or the shape or the values of a layer, forbid.
    """
    _check_model(model, options)
    chosen, skipped = {}, {}
    for path, module in model.named_modules():
        if is_packed(module):
            continue
        if is_experts(module):
            reason = _why_not_experts(model, path, module, options)
        elif is_linear(module):
            reason = _why_not(model, path, module, options)
        elif names := architectures.stacked_weights(module):
            reason = f"no linear layer: {listed(names)} hold many matrices each, as experts"
        else:
            continue
        if reason is None:
            chosen[path] = module
        else:
            skipped[path] = reason
    if not chosen and begun(model) is None:
        reasons = listed(f"{path}: {reason}" for path, reason in skipped.items())
        raise AdapterError(
            f"{type(model).__name__} has no linear layer to quantize ({reasons or 'none at all'})"
        )
    problems = [
        f"{name} {problem}"
        for path, module in chosen.items()
        for name, weight in weights_of(path, module)
        for problem in _problems(weight, options)
    ]
    if problems:
        raise AdapterError(f"cannot quantize to {options.format}: {listed(problems)}")
    return chosen, skipped


def _check_model(model: nn.Module, options: Options) -> None:
    check_bare(model)
    earlier = begun(model)
    if earlier is not None and earlier.options != options:
        raise AdapterError(
            f"{type(model).__name__} is half quantized, by an interrupted call with"
            f" {earlier.options}; allowed: the same, which goes on"
        )
    quantized = earlier is None and any(packed_modules(model))
    if quantized or getattr(model, "is_quantized", False):
        raise AdapterError(f"{type(model).__name__} is quantized already")
    check_unmerged(model)
    paths = {path for path, _ in model.named_modules() if path}
    unknown = [path for path in options.leave if path not in paths]
    if unknown:
        raise AdapterError(f"leave: {type(model).__name__} has no module {listed(unknown)}")


def weights_of(path: str, module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and matrix (out, in) of a layer; of experts, names and (experts, out, in)."""
    if not is_experts(module):
        yield path, weight_of(module)
        return
    for name in matrices_of(module):
        yield f"{path}.{name}", stack_of(module, name)


def _why_left(model: nn.Module, path: str, options: Options) -> str | None:
    bank = find_bank(model)
    heads = architectures.classifier_heads(model) if bank is None else bank.heads
    if is_within(path, heads):
        return "a head that trains"
    return "left as it is, as asked" if is_within(path, options.leave) else None


def _why_not_experts(
    model: nn.Module, path: str, module: nn.Module, options: Options
) -> str | None:
    if reason := _why_left(model, path, options):
        return reason
    if "forward" in vars(module):
        return "it carries a forward of its own"
    for name in matrices_of(module):
        if tied := tied_to(model, module, name):
            return f"its {name} is also {tied}"
        if not module._parameters[name].is_floating_point():
            return f"its {name} is {module._parameters[name].dtype}"
        if _kept_in_fp32(model, path, module, name):
            return _KEPT
    return None


def _why_not(model: nn.Module, path: str, module: nn.Module, options: Options) -> str | None:
    if reason := _why_left(model, path, options):
        return reason
    is_output = module is architectures.output_head(model)
    if is_output and not options.include_head:
        return "the output head; include_head=True takes it too"
    if type(module) not in PACKED:
        return f"a {type(module).__name__}, whose forward may differ"
    if "forward" in vars(module):
        return "it carries a forward of its own"
    if reader := architectures.reader_of(model, path):
        return f"in {reader} its weight is read or changed past the layer"
    if "weight" not in module._parameters:
        return "its weight is worked out at each forward (pruning, weight norm)"
    tied = tied_to(model, module)
    if tied and not is_output:
        return f"its weight is also {tied}"
    if not module.weight.is_floating_point():
        return f"its weight is {module.weight.dtype}"
    return _KEPT if _kept_in_fp32(model, path, module) else None


def _kept_in_fp32(model: nn.Module, path: str, module: nn.Module, name: str = "weight") -> bool:
    """Whether transformers held this layer back from 16 bits, whose range its numbers may leave."""
    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    patterns = [p.replace("*", ".*") for n in names for p in getattr(model, n, None) or ()]
    if module._parameters[name].dtype != torch.float32:
        return False
    if not any(re.search(pattern, f"{path}.{name}") for pattern in patterns):
        return False
    return any(p.is_floating_point() and p.dtype.itemsize == 2 for p in model.parameters())


def tied_to(model: nn.Module, module: nn.Module, name: str = "weight") -> str | None:
    """Another name of the module's parameter `name`, unless the whole module has two."""
    own = module._parameters[name]
    for other, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is own and model.get_submodule(owner_of(other)) is not module:
            return other
    return None


def _problems(weight: torch.Tensor, options: Options) -> Iterator[str]:
    size = options.group_size or _LEAST_GROUP
    if not weight.numel():
        yield "has no weights"
    elif options.format == "int4" and weight.shape[-1] % size:
        yield f"has {weight.shape[-1]} inputs, allowed: a multiple of {size}, or bits=8"
    elif weight.dtype.itemsize < 2:
        yield f"is held in {weight.dtype}, allowed: 16 bits and more"
    elif weight.is_meta:
        yield "is on the meta device, without values"
    elif not all(torch.isfinite(end.float()) for end in torch.aminmax(weight)):
        yield "holds inf or nan, or numbers beyond float32"
