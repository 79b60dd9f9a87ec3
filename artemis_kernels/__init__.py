"""Fused operations for adapting frozen transformer layers: LoRA and bottleneck adapters.

Triton kernels on a GPU, hand-written torch paths everywhere else, one meaning: each operation's
`reference.py`. Needs torch; uses triton when it is there.
"""

from .core.device import has_fast_bf16
from .core.frozen import FrozenAdapter
from .core.quantized import QuantizedWeight
from .core.rng import dropout_mask, new_seed
from .core.types import Choice, Cost, Unavailable
from .ops import explain
from .ops.adapter_linear.group import adapter_linear_group
from .ops.adapter_linear.op import adapter_linear
from .ops.attention.op import attention
from .ops.bottleneck_adapter.op import bottleneck_adapter
from .ops.cross_entropy.op import cross_entropy
from .ops.frozen_linear.op import FrozenLinear, frozen_linear
from .ops.gated_activation.op import gated_activation
from .ops.lora_linear.group import lora_linear_group
from .ops.lora_linear.op import lora_linear
from .ops.quantized_linear.op import quantized_linear
from .ops.rms_norm.op import rms_norm
from .ops.rotary_embedding.op import rotary_embedding
from .tuner import choices, tune

__all__ = [
    "Choice",
    "Cost",
    "FrozenAdapter",
    "FrozenLinear",
    "QuantizedWeight",
    "Unavailable",
    "adapter_linear",
    "adapter_linear_group",
    "attention",
    "bottleneck_adapter",
    "choices",
    "cross_entropy",
    "dropout_mask",
    "explain",
    "frozen_linear",
    "gated_activation",
    "has_fast_bf16",
    "lora_linear",
    "lora_linear_group",
    "new_seed",
    "quantized_linear",
    "rms_norm",
    "rotary_embedding",
    "tune",
]
