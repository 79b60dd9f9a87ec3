"""The frozen base of an eager path: one set of products, whatever the weight is held in.

`PlainBase` multiplies by a tensor: in bf16 by a pass of our own, else as BLAS does. `PackedBase`
holds a `QuantizedWeight`: its products run in 8 bits (`eight_bit.py`), or by weight only, through a
copy of the weight in x's dtype unless there are few rows (decoding), where the packed weight is
read once and never copied.
"""

from typing import NamedTuple

import torch
from torch.nn import functional

from . import bf16_products, eight_bit, packed_passes, quantized, thin_products
from .device import multiplies_int8
from .eight_bit_rows import Rounded
from .products import LowRank, through_weight
from .quantized import QuantizedWeight
from .types import Cost

MANY_ROWS = 16  # from here on int8 products of rounded rows beat bf16 and weight-only ones
MOST_SUMMED = (2**31 - 1) // 127**2  # int8 products whose sum int32 always holds
_FEW_ROWS = {"int8": 4, "fp8": 2, "int4": 2}  # up to here a copy of the weight costs more
_FEW_BF16_ROWS = {"int8": 16, "fp8": 16, "int4": 8}  # the same where they are multiplied in bf16
MOST_DIRECT_ROWS = 8  # rows that the compiled pass over a packed weight takes, but for bf16's
_BY_BYTES = (torch.float32, torch.bfloat16)
_ALIGNMENT = 32  # bytes: torch's int8 pass loads whole registers, and crashes at others

#: The end of a strategy whose dY is the gradient of logits, rounded with more care.
LOGITS = "_int8_logits"

#: The end of an operator's schema, for which `of` makes the base.
SCHEMA = "Tensor? weight_scale=None, Tensor? weight_offset=None"


class PlainBase(NamedTuple):
    """A weight [out, in] of the compute dtype, any strides."""

    weight: torch.Tensor

    def product(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        rounded: Rounded | None = None,
        plus: LowRank | None = None,
    ) -> torch.Tensor:
        """`x Wᵀ + bias + plus` [M, out]."""
        y = bf16_products.multiply(x, self.weight, bias, plus=plus)
        if y is not None:
            return y
        return LowRank.added_to(functional.linear(x, self.weight, bias), plus)

    def input_gradient(
        self, dy: torch.Tensor, into: torch.Tensor | None = None, plus: LowRank | None = None
    ) -> torch.Tensor:
        """`dY W + plus` [M, in], added to `into` in place where it is given."""
        dx = bf16_products.multiply(dy, self.weight.t(), into=into, plus=plus)
        if dx is not None:
            return dx
        dx = torch.mm(dy, self.weight) if into is None else into.addmm_(dy, self.weight)
        return LowRank.added_to(dx, plus)

    def fold(self, down: torch.Tensor, into: torch.Tensor) -> None:
        """`into = D W` [width, in] of a folded bottleneck, in W's dtype; D [width, out]."""
        in_bf16 = into.dtype == torch.bfloat16
        if not in_bf16 or thin_products.multiply(down, self.weight, into) is None:
            torch.mm(down.to(into.dtype), self.weight, out=into)

    def unfolded(self, gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`dF Wᵀ` [width, out], what the gradient of `F = D W` [width, in] is of D.

        In fp32 from a pass of our own over bf16 and in fp16, else in `dtype`, the weight's.
        """
        weight, out = self.weight, None
        if dtype == torch.bfloat16:
            wide = {"dtype": torch.float32}
            if weight.stride(0) == 1:
                out = thin_products.multiply(gradient, weight.t(), **wide)
            else:
                out = thin_products.multiply(weight, gradient.t(), by_columns=True, **wide)
                out = None if out is None else out.t()
        return through_weight(gradient, weight) if out is None else out


class PackedBase:
    """A quantized weight, its products in 8 bits or by weight only; one object a call."""

    def __init__(self, weight: QuantizedWeight, in_eight_bits: bool, direct: bool | None = None):
        """`direct`: read the packed weight as it is, or copy it; None decides by the rows."""
        self.weight, self.in_eight_bits, self.direct = weight, in_eight_bits, direct
        self._copy: torch.Tensor | None = None

    def product(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        rounded: Rounded | None = None,
        plus: LowRank | None = None,
    ) -> torch.Tensor:
        """`x Wᵀ + bias + plus` [M, out] in x's dtype.

        `rounded`: x in 8 bits, made for another product.
        """
        weight = self.weight
        if self.in_eight_bits:
            return eight_bit.linear(x, weight.data, weight.scale, bias, rounded, plus)
        y = self._few_rows(x) if self._reads_packed(x) else None
        if y is None:
            return PlainBase(self.dense(x.dtype)).product(x, bias, None, plus)
        return LowRank.added_to((y if bias is None else y + bias).to(x.dtype), plus)

    def input_gradient(
        self, dy: torch.Tensor, into: torch.Tensor | None = None, plus: LowRank | None = None
    ) -> torch.Tensor:
        """`dY W + plus` [M, in] in dY's dtype; in 8 bits, of the rounded `dY ⊙ scale`.

        Added to `into` in place where it is given.
        """
        if self.in_eight_bits:
            weight = self.weight
            return eight_bit.input_gradient(
                dy, weight.data, weight.scale, into, plus, weight.makes_logits
            )
        return PlainBase(self.dense(dy.dtype)).input_gradient(dy, into, plus)

    def fold(self, down: torch.Tensor, into: torch.Tensor) -> None:
        """`into = D W` [width, in] of a folded bottleneck, in any dtype; D [width, out].

        An int8 weight is multiplied as it is, where there is such a pass: `(D ⊙ scale) Wq`.
        """
        f = None
        if self._folds_as_held(into.dtype):
            f = thin_products.multiply(down.float() * self.weight.scale, self.weight.data, into)
        if f is None:
            PlainBase(self.dense(into.dtype)).fold(down, into)

    def unfolded(self, gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """As `PlainBase.unfolded`, for a weight that is dequantized to `dtype` if it has to be."""
        out = None
        if self._folds_as_held(dtype):
            out = thin_products.multiply(
                self.weight.data, gradient.t(), dtype=torch.float32, by_columns=True
            )
        if out is None:
            return PlainBase(self.dense(dtype)).unfolded(gradient, dtype)
        return out.t().mul_(self.weight.scale)

    def _folds_as_held(self, dtype: torch.dtype) -> bool:
        in_bf16 = dtype == torch.bfloat16 and self.weight.format == "int8"
        return in_bf16 and thin_products.available()

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] in `dtype`: a copy, made once a call."""
        if self._copy is None or self._copy.dtype != dtype:
            self._copy = quantized.dequantized(self.weight, dtype)
        return self._copy

    def _reads_packed(self, x: torch.Tensor) -> bool:
        in_bf16 = packed_passes.takes_bf16_rows(x, self.weight)
        if self.direct is None:
            few = _FEW_BF16_ROWS if in_bf16 else _FEW_ROWS
            return x.shape[0] <= few[self.weight.format]
        return self.direct and (in_bf16 or x.shape[0] <= MOST_DIRECT_ROWS)

    def _few_rows(self, x: torch.Tensor) -> torch.Tensor | None:
        """`x Wᵀ` in fp32, every byte of the weight read once; None where nothing does that."""
        if x.device.type != "cpu" or x.dtype not in _BY_BYTES or not x.numel():
            return None
        data, (out_features, columns) = self.weight.data, self.weight.shape
        # Of other sizes torch's reads past their end.
        torch_can = self.weight.format == "int8" and not (out_features % 16 or columns % 32)
        plain_bf16 = x.dtype == torch.bfloat16 and not packed_passes.takes_bf16_rows(x, self.weight)
        torch_is_fast = torch_can and plain_bf16 and _is_aligned(data)
        y = None if torch_is_fast else packed_passes.few_rows(x, self.weight)
        if y is not None or not torch_can:
            return y
        ones = x.new_ones(out_features)  # the scales would be rounded to x's dtype
        y = torch._weight_int8pack_mm(_aligned(x), _aligned(data), ones)
        return y.float().mul_(self.weight.scale)


def _is_aligned(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, contiguous and at such an address; a view or a mapped file may start anywhere."""
    if _is_aligned(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


Base = PlainBase | PackedBase


def of(
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    strategy: str,
) -> Base:
    """The base that an operator's tensors and strategy stand for (see `packed_strategy`)."""
    if scale is None:
        return PlainBase(weight)
    logits = strategy.endswith(LOGITS)
    packed = QuantizedWeight.of_parts(weight, scale, offset, makes_logits=logits)
    direct = {"direct": True, "copy": False}.get(strategy.rpartition("_")[2])
    return PackedBase(packed, logits or strategy.endswith(("_int8", "_fp8")), direct)


def packed_strategy(weight: object, rows: int) -> tuple[str, str]:
    """What a quantized weight adds to the name of a strategy, and why; nothing for a tensor."""
    if not isinstance(weight, QuantizedWeight):
        return "", ""
    bits, native_int8 = weight.activation_bits, multiplies_int8(weight.device)
    if bits != 16 and weight.format == "int8" and max(weight.shape) > MOST_SUMMED:
        return "_weight_only", f" and int32 may not hold sums over {max(weight.shape):,} products"
    if bits == 8 and weight.format == "fp8":
        return "_fp8", " and activation_bits is 8, in float32: no processor multiplies e4m3"
    int8 = LOGITS if weight.makes_logits else "_int8"
    if bits == 8:
        how = "" if native_int8 else ", in float32: this processor has no int8 dot product"
        return int8, f" and activation_bits is 8{how}"
    if bits == 16:
        return "_weight_only", " and activation_bits is 16"
    if weight.format != "int8":
        return "_weight_only", f" and products of 8-bit activations need int8, not {weight.format}"
    if not native_int8:
        return "_weight_only", f" and no int8 dot product serves {weight.device.type!r} here"
    if rows < MANY_ROWS:
        return "_weight_only", f" and fewer than {MANY_ROWS} rows gain nothing from int8 products"
    return int8, " and int8 products are twice as fast here"


def as_held(cost: Cost, weight: object, itemsize: int) -> Cost:
    """`cost`, reckoned for a weight of `itemsize` bytes a number, with those of a quantized one."""
    if not isinstance(weight, QuantizedWeight):
        return cost
    return cost + Cost(0, weight.nbytes - itemsize * weight.shape[0] * weight.shape[1])


def in_features(weight: torch.Tensor) -> int:
    """Input features of an operator's weight, packed or not: int4 holds two numbers in a byte."""
    return weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
