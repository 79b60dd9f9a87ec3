"""An adapted layer whose tensors no longer change: its constants, and its pass over few rows.

LoRA and a bottleneck on a linear layer are then one formula over every base:

    y1 = x Wᵀ + bias     z = from Fᵀ + c     y = y1 + scale · act(z) Gᵀ

LoRA has F = A, G = B and the identity. A bottleneck has G = U and bias = b + scale·b_u, and either
reads x, with F = D W and c = D b + b_d, or y1, with F = D and c = b_d − scale·D b_u.
"""

from dataclasses import dataclass

import torch

from . import native
from .call import dense_weight
from .packed_passes import FORMATS, has_bf16_rows
from .products import accumulator
from .quantized import QuantizedWeight
from .types import Factor, Scale, Unavailable
from .units import KINDS

_BF16 = len(FORMATS)  # of a tensor, as numbered in native/formats.h
#: Rows of a call that the pass serves, by what the weight is held in.
MOST_ROWS = {"int8": 16, "fp8": 16, "int4": 8, "tensor": 8}


@dataclass(frozen=True, eq=False)
class FrozenAdapter:
    """The constants of `frozen_linear`, made once by `lora` or `bottleneck`, in one dtype.

    `none` stands for a layer without an adapter. Make them anew when a tensor that they were made
    of has changed.

    Args:
        down: F [r, in], or [r, out] where the adapter reads the layer's output.
        up: G [out, r].
        bias: [out] or None, that of the base and the adapter's together.
        bias_down: c [r] or None.
        scale: a float, or a 0-d tensor.
        activation: "relu", "gelu", "gelu_tanh", "silu" or "identity".
        reads_output: whether z is made from y1, not from x.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None = None
    bias_down: torch.Tensor | None = None
    scale: float | torch.Tensor = 1.0
    activation: str = "identity"
    reads_output: bool = False

    @classmethod
    @torch.no_grad()
    def lora(
        cls,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scale: Factor = 1.0,
        *,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> "FrozenAdapter":
        """The constants of `lora_linear` with these arguments, in `dtype` (None: lora_a's)."""
        dtype = dtype or lora_a.dtype
        return cls(
            _constant(lora_a, dtype), _constant(lora_b, dtype), _constant(bias, dtype),
            scale=_number(scale),
        )  # fmt: skip

    @classmethod
    @torch.no_grad()
    def bottleneck(
        cls,
        weight: torch.Tensor | QuantizedWeight,
        down: torch.Tensor,
        up: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        bias_down: torch.Tensor | None = None,
        bias_up: torch.Tensor | None = None,
        activation: str = "gelu",
        scale: Factor = 1.0,
        dtype: torch.dtype | None = None,
    ) -> "FrozenAdapter":
        """The constants of `adapter_linear` with these arguments, in `dtype` (None: down's).

        D is folded through the weight where that reads less: on a GPU always, on a CPU where the
        layer has fewer inputs than outputs.
        """
        dtype, scale = dtype or down.dtype, _number(scale)
        out_features, in_features = weight.shape
        wide = accumulator(dtype)
        before, through, inner = bias, down, bias_down
        shift = None if bias_up is None else bias_up.to(wide) * scale
        total = shift if bias is None else bias.to(wide) if shift is None else bias.to(wide) + shift
        folds = down.device.type != "cpu" or in_features < out_features
        if folds:
            through = torch.mm(down.to(dtype), dense_weight(weight, dtype))
        elif shift is not None:
            before = -shift
        else:
            before = None
        if before is not None:
            moved = torch.mv(down.to(wide), before.to(wide))
            inner = moved if bias_down is None else moved + bias_down.to(wide)
        return cls(
            _constant(through, dtype), _constant(up, dtype), _constant(total, dtype),
            _constant(inner, dtype), scale, activation, not folds,
        )  # fmt: skip

    @classmethod
    @torch.no_grad()
    def none(
        cls,
        weight: torch.Tensor | QuantizedWeight,
        *,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype,
    ) -> "FrozenAdapter":
        """No adapter, of rank 0: the layer `x Wᵀ + bias` by itself, in `dtype`."""
        (out_features, in_features), like = weight.shape, {"dtype": dtype, "device": weight.device}
        return cls(
            torch.empty(0, in_features, **like), torch.empty(out_features, 0, **like),
            _constant(bias, dtype),
        )  # fmt: skip

    @property
    def rank(self) -> int:
        """Rows of F; 0: there is no adapter."""
        return self.down.shape[0]

    @property
    def is_linear(self) -> bool:
        """Whether its units are `x Fᵀ` as they are, as LoRA's."""
        return self.activation == "identity" and self.bias_down is None

    @property
    def dtype(self) -> torch.dtype:
        """Of all constants."""
        return self.down.dtype


def _constant(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype).contiguous()


def _number(scale: Factor) -> float | torch.Tensor:
    """A scale as a constant: a float on a CPU; a GPU is not waited for."""
    scale = Scale.of(scale).value
    if isinstance(scale, torch.Tensor) and scale.device.type != "cpu":
        return scale.detach().clone()
    return float(scale)


def most_few_rows(
    dtype: torch.dtype, device: torch.device, weight: torch.Tensor | QuantizedWeight
) -> int:
    """Up to how many rows `FewRows` serves a call: bf16 on a CPU that multiplies it, else 0."""
    if dtype != torch.bfloat16 or device.type != "cpu" or not weight.shape[0]:
        return 0
    packed = isinstance(weight, QuantizedWeight)
    fits = (weight.group_size or 64) % 64 == 0 if packed else weight.is_contiguous()
    return most_rows_here(dtype, weight.format if packed else "tensor") if fits else 0


def most_rows_here(dtype: torch.dtype, format: str) -> int:
    """The same for this CPU and a weight of a format (`tensor`: plain) that fits."""
    if dtype != torch.bfloat16 or not has_bf16_rows():
        return 0
    return MOST_ROWS[format]


class FewRows:
    """The whole layer for a few rows in one pass, where `most_few_rows` allows.

    Raises:
        Unavailable: no such pass is compiled here, or it does not take such a weight.
    """

    def __init__(self, weight: torch.Tensor | QuantizedWeight, adapter: FrozenAdapter):
        if not most_few_rows(adapter.dtype, adapter.down.device, weight):
            raise Unavailable("frozen_linear: no compiled pass of few rows takes this weight here")
        if isinstance(weight, QuantizedWeight):
            parts, group = (weight.data, weight.scale, weight.offset), weight.group_size or 0
            format = FORMATS.index(weight.format)
        else:
            parts, group, format = (weight, None, None), 0, _BF16
        tensors = (*parts, adapter.down, adapter.up, adapter.bias, adapter.bias_down)
        # Tensors of their own, which the owners' `.data =` leaves alone.
        self._held = [None if t is None else t.detach().contiguous() for t in tensors]
        (out_features, rank), in_features = adapter.up.shape, weight.shape[1]
        self._sizes = (in_features, out_features, group, rank)
        self._options = (
            float(adapter.scale), format, KINDS.index(adapter.activation), adapter.reads_output
        )  # fmt: skip
        self._pass = native.library().handle.artemis_frozen_bf16

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in], bf16."""
        x, (k, n, _, _) = x.contiguous(), self._sizes
        y = x.new_empty(*x.shape[:-1], n)
        # Asked for at each call: `share_memory_` and `resize_` move what a storage holds.
        addresses = [None if t is None else t.data_ptr() for t in self._held]
        self._pass(
            x.data_ptr(), *addresses, y.data_ptr(), x.numel() // k, *self._sizes, *self._options,
            torch.get_num_threads(),
        )  # fmt: skip
        return y
