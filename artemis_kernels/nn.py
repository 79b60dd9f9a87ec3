"""Modules around the operations: LoRA and bottleneck adapters on frozen linear layers.

Each keeps the layer it adapts (`base`, frozen) and owns its adapter's parameters in fp32. A fresh
module computes what its base computes: the second matrix starts at zero.
"""

import math

import torch
from torch import nn

from .core.activations import ACTIVATIONS
from .ops.adapter_linear.op import adapter_linear
from .ops.bottleneck_adapter.op import bottleneck_adapter
from .ops.lora_linear.op import lora_linear

__all__ = ["AdapterLinear", "BottleneckAdapter", "LoRALinear"]


class LoRALinear(nn.Module):
    """`y = base(x) + scale · (dropout(x) Aᵀ) Bᵀ` (Hu et al., arXiv 2106.09685).

    Args:
        base: the layer to adapt; it is frozen in place.
        rank: rows of A, at least 1.
        scale: the factor itself, not alpha/rank.
        dropout_p: dropout on x, in training mode.
        impl: passed to `lora_linear`.

    Shapes: x [..., in] -> [..., out]. `lora_a` [rank, in] starts Kaiming-uniform, `lora_b`
    [out, rank] at zero.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 8,
        scale: float = 1.0,
        *,
        dropout_p: float = 0.0,
        impl: str | None = None,
    ):
        super().__init__()
        _positive("rank", rank)
        _probability(dropout_p)
        self.base = _frozen(base)
        self.scale, self.dropout_p, self.impl = scale, dropout_p, impl
        made = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, **made))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, **made))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int = 8, scale: float = 1.0, **options):
        """Adapt `linear`, sharing its weight and freezing it; options as for the constructor."""
        return cls(linear, rank, scale, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return lora_linear(
            x, self.base.weight, self.lora_a, self.lora_b, self.scale, bias=self.base.bias,
            dropout_p=self.dropout_p if self.training else 0.0, impl=self.impl,
        )  # fmt: skip

    def extra_repr(self) -> str:
        rank = self.lora_a.shape[0]
        return f"rank={rank}, scale={self.scale}, dropout_p={self.dropout_p}, impl={self.impl!r}"


class BottleneckAdapter(nn.Module):
    """`y = residual + scale · (dropout(act(x Dᵀ + b_d)) Uᵀ + b_u)` (Houlsby et al., 1902.00751).

    Args:
        hidden: features of x.
        width: units of the bottleneck, at least 1.
        activation: "relu", "gelu", "gelu_tanh", "silu" or "identity".
        dropout_p: dropout on the bottleneck's units, in training mode.
        scale: factor of the branch.
        bias: whether b_d and b_u exist (they start at zero).
        impl: passed to `bottleneck_adapter`.

    Shapes: x [..., hidden] -> the same. `down` [width, hidden] starts normal(0, 0.02), `up`
    [hidden, width] at zero.
    """

    def __init__(
        self,
        hidden: int,
        width: int = 64,
        *,
        activation: str = "gelu",
        dropout_p: float = 0.0,
        scale: float = 1.0,
        bias: bool = True,
        impl: str | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        _positive("width", width)
        _probability(dropout_p)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
        self.activation, self.dropout_p, self.scale, self.impl = activation, dropout_p, scale, impl
        made = {"device": device, "dtype": torch.float32}
        self.down = nn.Parameter(torch.empty(width, hidden, **made).normal_(0, 0.02))
        self.up = nn.Parameter(torch.zeros(hidden, width, **made))
        self.bias_down = nn.Parameter(torch.zeros(width, **made)) if bias else None
        self.bias_up = nn.Parameter(torch.zeros(hidden, **made)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, width: int = 64, **options):
        """A bottleneck for the output of `linear`, on its device; `linear` itself is untouched."""
        return cls(linear.out_features, width, device=linear.weight.device, **options)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return bottleneck_adapter(
            x, self.down, self.up, residual=residual, scale=self.scale, **self._options()
        )

    def _options(self) -> dict:
        return {
            "bias_down": self.bias_down,
            "bias_up": self.bias_up,
            "activation": self.activation,
            "dropout_p": self.dropout_p if self.training else 0.0,
            "impl": self.impl,
        }

    def extra_repr(self) -> str:
        width, hidden = self.down.shape
        return (
            f"hidden={hidden}, width={width}, activation={self.activation!r}, "
            f"dropout_p={self.dropout_p}, scale={self.scale}, impl={self.impl!r}"
        )


class AdapterLinear(BottleneckAdapter):
    """A bottleneck on the output of a frozen linear layer, `adapter_linear` as a module.

    Args:
        base: the layer to adapt; it is frozen in place.
        width, activation, dropout_p, scale, bias, impl: as in `BottleneckAdapter`.

    Shapes: x [..., in] -> [..., out].
    """

    def __init__(self, base: nn.Linear, width: int = 64, **options):
        super().__init__(base.out_features, width, device=base.weight.device, **options)
        self.base = _frozen(base)

    @classmethod
    def from_linear(cls, linear: nn.Linear, width: int = 64, **options):
        """Adapt `linear`, sharing its weight and freezing it; options as for the constructor."""
        return cls(linear, width, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return adapter_linear(
            x, self.base.weight, self.down, self.up, bias=self.base.bias, scale=self.scale,
            **self._options(),
        )  # fmt: skip


def _frozen(base: nn.Linear) -> nn.Linear:
    if not isinstance(base, nn.Linear):
        raise TypeError(f"base must be a torch.nn.Linear, got {type(base).__name__}")
    return base.requires_grad_(False)


def _positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _probability(p: float) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {p!r}")
