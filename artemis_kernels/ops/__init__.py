"""One folder an operation: its meaning, its paths, its public function."""

from collections.abc import Callable
from dataclasses import replace

import torch

from ..core import call, native
from ..core.types import Choice

#: What operations call the tensor whose device and dtype decide.
_FIRST = ("x", "logits", "gate", "q")


def explain(op: str | Callable, *args, **kwargs) -> Choice:
    """The path that a call of `op` with these arguments takes, why, and its cost.

    Chosen by the function that dispatches the call itself; nothing runs. On a CPU the compiled
    passes are made, if they were not yet, and where they cannot be, the reason says why.

    Args:
        op: a public operation (`lora_linear`, `adapter_linear`, `bottleneck_adapter`,
            `quantized_linear`, `frozen_linear`, `lora_linear_group`, `adapter_linear_group`,
            `cross_entropy`, `rms_norm`, `gated_activation`, `rotary_embedding`,
            `attention`) or its name.

    Raises:
        ValueError: an unknown operation; and whatever the call itself would refuse.
    """
    from .adapter_linear import group as adapter_linear_group
    from .adapter_linear import op as adapter_linear
    from .attention import op as attention
    from .bottleneck_adapter import op as bottleneck_adapter
    from .cross_entropy import op as cross_entropy
    from .frozen_linear import op as frozen_linear
    from .gated_activation import op as gated_activation
    from .lora_linear import group as lora_linear_group
    from .lora_linear import op as lora_linear
    from .quantized_linear import op as quantized_linear
    from .rms_norm import op as rms_norm
    from .rotary_embedding import op as rotary_embedding

    operations = (
        lora_linear, adapter_linear, bottleneck_adapter, quantized_linear, frozen_linear,
        lora_linear_group, adapter_linear_group, cross_entropy, rms_norm,
        gated_activation, rotary_embedding, attention,
    )  # fmt: skip
    known = {module.NAME: module for module in operations}
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in known:
        raise ValueError(f"explain: op must be one of {sorted(known)}, got {name!r}")
    x = args[0] if args else next(kwargs[first] for first in _FIRST if first in kwargs)
    return _with_missing_passes(known[name].explain(*args, **kwargs), x)


def _with_missing_passes(choice: Choice, x: torch.Tensor) -> Choice:
    """The choice, its reason completed where an eager path has to do without its C passes."""
    if choice.impl != "eager":
        return choice
    why = native.why_missing(x.device, call.compute_dtype(x))
    return choice if why is None else replace(choice, reason=f"{choice.reason}; {why}")
