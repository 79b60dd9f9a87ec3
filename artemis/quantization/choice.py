"""What to pack and how: options and model in, checked layers out; nothing is changed."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import architectures
from ..bank import find_bank
from ..errors import AdapterError, listed
from ..layers import PACKED, weight_of
from ..merging import check_unmerged
from ..quantized_layers import is_packed, packed_layers
from ..wrappers import check_bare
from .report import LayerReport

#: (bits, format of the user) -> format of the weight.
_FORMATS = {(8, "int"): "int8", (8, "fp8"): "fp8", (4, "int"): "int4"}
_ADAPTER_BITS = (32, 16, 8)
_GROUP_SIZES = (256, 128, 64, 32, 16, 8)
_LEAST_GROUP = 8
#: Name under which `Begun` stands on a model.
BEGUN = "quantization_begun"


@dataclass(frozen=True)
class Options:
    """How weights and adapters are to be held, checked; `format` is a `QuantizedWeight`'s."""

    format: str
    group_size: int | None
    activation_bits: int | str
    adapter_bits: int
    include_head: bool
    calibrated: bool
    leave: tuple[str, ...]


@dataclass(frozen=True)
class Begun:
    """What a call has done so far; it stands on the model until the call ends.

    A weight is dropped once it is packed, so what a call that was interrupted has done cannot be
    undone: the next call with the same options goes on.
    """

    options: Options
    dtype: torch.dtype
    bytes_before: int
    reports: dict[str, LayerReport] = field(default_factory=dict)


def begun(model: nn.Module) -> Begun | None:
    """What a call that was interrupted left, or None."""
    return getattr(model, BEGUN, None)


def checked_options(
    bits, format, group_size, activation_bits, adapter_bits, include_head, calibrated, leave=()
) -> Options:
    """The options, or one `AdapterError` for the first that makes no sense."""
    if (bits, format) not in _FORMATS or isinstance(bits, bool):
        raise AdapterError(
            f"bits, format: got {bits!r}, {format!r}, allowed: 8 with 'int' or 'fp8', 4 with 'int'"
        )
    packed = _FORMATS[bits, format]
    if isinstance(adapter_bits, bool) or adapter_bits not in _ADAPTER_BITS:
        raise AdapterError(f"adapter_bits: got {adapter_bits!r}, allowed: 32, 16 or 8")
    if activation_bits not in ("auto", 8, 16) or (activation_bits == 8 and packed == "int4"):
        raise AdapterError(
            f"activation_bits: got {activation_bits!r}, allowed: 'auto' or 16, and 8 where weights"
            f" are int8 or fp8; these are {packed}"
        )
    if group_size is not None and (packed != "int4" or group_size not in _GROUP_SIZES):
        raise AdapterError(
            f"group_size: got {group_size!r}, allowed: with bits=4 one of {listed(_GROUP_SIZES)},"
            " else None"
        )
    if calibrated and packed != "int4":
        raise AdapterError(f"data: got some for {packed}, allowed: with bits=4, which it serves")
    if not isinstance(include_head, bool):
        raise AdapterError(f"include_head: got {include_head!r}, allowed: True or False")
    if isinstance(leave, str) or not isinstance(leave, Iterable):
        raise AdapterError(f"leave: got {leave!r}, allowed: a list of paths of modules")
    return Options(
        packed, group_size, activation_bits, adapter_bits, include_head, bool(calibrated),
        tuple(leave),
    )  # fmt: skip


def choose_layers(
    model: nn.Module, options: Options
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers to pack by path, and path -> reason for all other matrices that layers multiply.

    Raises `AdapterError` where the model as a whole, or the shape or the values of a layer, forbid.
    """
    _check_model(model, options)
    chosen, skipped = {}, {}
    for path, module in model.named_modules():
        if names := architectures.stacked_weights(module):
            skipped[path] = f"no linear layer: {listed(names)} hold many matrices each, as experts"
        if not isinstance(module, (nn.Linear, Conv1D)) or is_packed(module):
            continue
        reason = _why_not(model, path, module, options)
        if reason is None:
            chosen[path] = module
        else:
            skipped[path] = reason
    if not chosen and begun(model) is None:
        reasons = listed(f"{path}: {reason}" for path, reason in skipped.items())
        raise AdapterError(
            f"{type(model).__name__} has no linear layer to quantize ({reasons or 'none at all'})"
        )
    problems = [f"{path} {p}" for path, m in chosen.items() for p in _problems(m, options)]
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
    quantized = earlier is None and any(packed_layers(model))
    if quantized or getattr(model, "is_quantized", False):
        raise AdapterError(f"{type(model).__name__} is quantized already")
    check_unmerged(model)
    paths = {path for path, _ in model.named_modules() if path}
    unknown = [path for path in options.leave if path not in paths]
    if unknown:
        raise AdapterError(f"leave: {type(model).__name__} has no module {listed(unknown)}")


def _why_not(model: nn.Module, path: str, module: nn.Module, options: Options) -> str | None:
    bank = find_bank(model)
    heads = architectures.classifier_heads(model) if bank is None else bank.heads
    if _within(path, heads):
        return "a head that trains"
    if _within(path, options.leave):
        return "left as it is, as asked"
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
    if _kept_in_fp32(model, path, module):
        return "transformers keeps it in float32, beside 16 bits, for its range"
    return None


def _kept_in_fp32(model: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether transformers held this layer back from 16 bits, whose range its numbers may leave."""
    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    patterns = [p.replace("*", ".*") for n in names for p in getattr(model, n, None) or ()]
    if module.weight.dtype != torch.float32:
        return False
    if not any(re.search(pattern, f"{path}.weight") for pattern in patterns):
        return False
    return any(p.is_floating_point() and p.dtype.itemsize == 2 for p in model.parameters())


def _within(path: str, modules: Iterable[str]) -> bool:
    return any(f"{path}.".startswith(f"{module}.") for module in modules)


def tied_to(model: nn.Module, module: nn.Module) -> str | None:
    """Another name of the layer's weight, unless the whole layer has two."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, _ = name.rpartition(".")
        if parameter is module.weight and model.get_submodule(owner) is not module:
            return name
    return None


def _problems(module: nn.Module, options: Options) -> Iterator[str]:
    weight = weight_of(module)
    size = options.group_size or _LEAST_GROUP
    if not weight.numel():
        yield "has no weights"
    elif options.format == "int4" and weight.shape[1] % size:
        yield f"has {weight.shape[1]} inputs, allowed: a multiple of {size}, or bits=8"
    elif weight.dtype.itemsize < 2:
        yield f"is held in {weight.dtype}, allowed: 16 bits and more"
    elif weight.is_meta:
        yield "is on the meta device, without values"
    elif not all(torch.isfinite(end.float()) for end in torch.aminmax(weight)):
        yield "holds inf or nan, or numbers beyond float32"
