"""What is learned from what: the features u whose product with dY is a target's gradient."""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from ..config import HybridAdapterConfig
from ..layers.bank import initial
from ..plan import SiteSpec

#: (x, y) of a call -> u, all [..., features].
Reader = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
#: Of a module, and the adapter that it has or would get: the reader, and how many features u has.
Reading = Callable[[SiteSpec, HybridAdapterConfig, torch.device], tuple[Reader, int]]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "identity": lambda x: x,
}


def weight_reader(
    spec: SiteSpec, config: HybridAdapterConfig, device: torch.device
) -> tuple[Reader, int]:
    """The target's own input, so that dYᵀ u is its weight's gradient; a block's output for it."""
    if spec.kind == "block":
        return lambda x, y: y, spec.out_features
    return lambda x, y: x, spec.in_features


def adapter_reader(
    spec: SiteSpec, config: HybridAdapterConfig, device: torch.device
) -> tuple[Reader, int]:
    """What a fresh adapter's zero matrix multiplies, so that dYᵀ u is that matrix's gradient.

    Fresh whatever the model has, and of the configuration's size: else a module that has much rank
    already would score for having it. Drawn from torch's CPU generator.
    """
    if spec.kind == "lora":
        a = initial("lora_a", (config.lora_rank, spec.in_features), config.init).to(device)
        return partial(_lora, a, config.scaling_factor), config.lora_rank
    down = initial("down", (config.adapter_size, spec.out_features), config.init).to(device)
    reader = partial(_bottleneck, down, config)
    return reader, config.adapter_size + config.adapter_bias


def _lora(a: torch.Tensor, scale: float, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return scale * (x.float() @ a.t())


def _bottleneck(
    down: torch.Tensor, config: HybridAdapterConfig, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """The units, and a one for the bias."""
    units = ACTIVATIONS[config.activation](y.float() @ down.t())
    if config.adapter_bias:
        units = torch.cat([units, torch.ones_like(units[..., :1])], dim=-1)
    return config.adapter_scale * units
