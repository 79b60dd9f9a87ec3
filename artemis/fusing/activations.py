"""What an activation module computes, by the name that `gated_activation` has for it."""

import functools

from torch import nn

_BY_NAME = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "linear": "identity",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_OF_GELU = {"none": "gelu", "tanh": "gelu_tanh"}  # torch's own module, which has both


def activation_of(act_fn: object) -> str | None:
    """The activation's name; None where it has none, or where more happens at its call."""
    if not isinstance(act_fn, nn.Module) or _is_altered(act_fn):
        return None
    if type(act_fn) is nn.GELU:
        return _OF_GELU[act_fn.approximate]
    return _classes().get(type(act_fn))


def why_no_activation(act_fn: object) -> str:
    """Why `activation_of` knows none."""
    if isinstance(act_fn, nn.Module) and _is_altered(act_fn):
        return "its act_fn carries hooks or a forward of its own"
    return f"its act_fn, a {type(act_fn).__name__}, is none of gated_activation's"


def _is_altered(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


@functools.cache
def _classes() -> dict[type[nn.Module], str]:
    """Class -> name, by what transformers calls the activation: its classes change their names."""
    from transformers.activations import ACT2CLS

    entries = {known: ACT2CLS[known] for known in _BY_NAME}
    return {
        entry[0] if isinstance(entry, tuple) else entry: _BY_NAME[known]
        for known, entry in entries.items()
    }
