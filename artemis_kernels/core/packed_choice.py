"""How a GPU multiplies by a quantized weight: a choice by costs, told in one sentence.

    weight_only   packed tiles are dequantized inside the product: few rows, where bytes decide
    dense         a dense copy, then the products of a tensor: many rows, nothing in 8 bits
    int8, fp8     x rounded row by row, products on 8-bit tensor cores: many rows

The name of a strategy ends in one of these; in `int8_logits` where dY is the gradient of logits.
docs/quantization.md works the costs out.
"""

import functools

import torch

from .base import LOGITS
from .device import Chip
from .device import chip as chip_of
from .quantized import QuantizedWeight
from .strategies import vendor_multiplies, why_no_eight_bits
from .tiling import FEW_ROWS, Shape
from .tuning import balance, vendor_gap
from .tuning import choose_adapter as adapter_of_tensor
from .tuning import choose_lora as lora_of_tensor

PRODUCTS = ("weight_only", "dense", "int8", "fp8")


def choose(weight: QuantizedWeight, shape: Shape, chip: Chip) -> tuple[str, bool, str]:
    """`(one of PRODUCTS, by the vendor, reason)` for y [m, n] = x [m, k] Wᵀ on a chip."""
    bits = weight.activation_bits
    refusal = why_no_eight_bits(weight.format, max(weight.shape), chip)
    if bits == 8 and not refusal:
        return weight.format, _vendor(weight, shape, chip), "activation_bits is 8"
    if bits == 8:
        refusal = f"activation_bits is 8, but {refusal}"
    if shape.m <= FEW_ROWS:
        why = "with few rows the packed weight's bytes are all there is"
        return "weight_only", False, f"{refusal}, and {why}" if bits == 8 else why
    if bits == "auto" and weight.makes_logits and weight.format == "fp8":
        refusal = refusal or "the gradient of logits would lose too much in e4m3"
    if bits == "auto" and not refusal:
        vendor = _vendor(weight, shape, chip)
        return weight.format, vendor, "8-bit tensor cores are twice as fast with many rows"
    why = refusal if bits != 16 else "activation_bits is 16"
    # A copy moves 2 to 3·n·k bytes; dequantizing in the loop doubles the time of 2·m·n·k FLOPs.
    if shape.dtype.itemsize == 2 and shape.m <= balance(chip):
        return "weight_only", False, f"{why}, and a dense copy costs more than dequantizing tiles"
    return "dense", False, f"{why}, and with many rows a dense copy costs little"


def _vendor(weight: QuantizedWeight, shape: Shape, chip: Chip) -> bool:
    """Whether torch's 8-bit product and one more pass over y beat the fused kernel.

    int8 leaves int32 sums behind (8·m·n bytes written and read), e4m3 y itself (4).
    """
    if not vendor_multiplies(weight.format, shape, chip):
        return False
    integers = weight.format == "int8"
    if integers and chip.generation >= 100:
        return True  # Triton reaches only the older int8 instructions there
    bytes_again, twice_as_fast = 8 if integers else 4, 2
    gap = vendor_gap(chip, eight_bit=not integers)
    return gap * 2 * shape.k > bytes_again * twice_as_fast * balance(chip)


def product(
    weight: QuantizedWeight, rows: int, rank: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, str]:
    """What a quantized weight adds to the name of a fused strategy on a device, and why."""
    out_features, in_features = weight.shape
    how, vendor, why = choose(
        weight, Shape(rows, out_features, in_features, rank, dtype), chip_of(device)
    )
    end = LOGITS if how == "int8" and weight.makes_logits else "_" + how
    return "_vendor" * vendor + end, why


@functools.cache
def told_by(strategy: str) -> tuple[str, bool]:
    """What `product` added: one of PRODUCTS, and whether dY is the gradient of logits."""
    if strategy.endswith(LOGITS):
        return "int8", True
    return next(how for how in PRODUCTS if strategy.endswith(how)), False


def lora_strategy(
    weight: QuantizedWeight, rows: int, rank: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, str]:
    """`(strategy, reason)` of a fused `lora_linear` over a quantized weight."""
    suffix, why = product(weight, rows, rank, dtype, device)
    if suffix == "_dense":
        out_features, in_features = weight.shape
        vendor = lora_of_tensor(
            Shape(rows, out_features, in_features, rank, dtype), True, chip_of(device)
        )[0]
        return vendor + suffix, why
    return suffix.removeprefix("_") if "vendor" in suffix else "split" + suffix, why


def adapter_strategy(
    weight: QuantizedWeight, rows: int, width: int, trains: bool, dtype: torch.dtype,
    device: torch.device,
) -> tuple[str, str]:  # fmt: skip
    """`(strategy, reason)` of a fused `adapter_linear` over a quantized weight."""
    out_features, in_features = weight.shape
    shape = Shape(rows, out_features, in_features, width, dtype)
    copied = (1 + trains) * (weight.nbytes + 2 * dtype.itemsize * out_features * in_features)
    folding, why = adapter_of_tensor(shape, trains, chip_of(device), copied)
    suffix, also = product(weight, rows, width, dtype, device)
    if suffix != "_dense" or folding == "plain":
        folding = folding.removesuffix("_vendor")
    if folding != "plain" and suffix != "_dense":
        why = "folding leaves no pass over y0"
    return folding + suffix, f"{why} and {also}"
