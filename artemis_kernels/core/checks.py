"""What the public functions refuse, each with one sentence that names the argument."""

import torch

from .activations import ACTIVATIONS
from .call import autocasts
from .quantized import QuantizedWeight
from .types import IMPLEMENTATIONS


def tensor(
    op: str,
    name: str,
    value: object,
    shape: tuple[int | None, ...],
    like: torch.Tensor,
    of: str = "x",
):
    """Refuse what is no floating tensor of `shape` (None = any) where `like`, named `of`, is."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {kind}")
    fits = value.dim() == len(shape)
    for size, want in zip(value.shape, shape, strict=False):  # a generator takes twice as long
        fits = fits and (want is None or size == want)
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name} must have shape ({wanted}), got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{op}: {name} is on {value.device}, but {of} is on {like.device}")


def optional(op: str, name: str, value, shape: tuple[int | None, ...], like: torch.Tensor) -> None:
    """`tensor`, for an argument that may be None."""
    if value is not None:
        tensor(op, name, value, shape, like)


def weight(op: str, value: object, x: torch.Tensor) -> None:
    """Refuse a base weight that is neither a tensor nor a `QuantizedWeight` of (any, in) with x."""
    if not isinstance(value, QuantizedWeight):
        return tensor(op, "weight", value, (None, x.shape[-1]), x)
    if value.shape[1] != x.shape[-1]:
        shape = tuple(value.shape)
        raise ValueError(f"{op}: weight must have shape (any, {x.shape[-1]}), got {shape}")
    if value.device != x.device:
        raise ValueError(f"{op}: weight is on {value.device}, but x is on {x.device}")


def input_tensor(op: str, x: object) -> None:
    """Refuse an x that is no floating tensor with at least one dimension."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{op}: x must be a floating-point tensor, got {kind}")
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a 0-d tensor")


def weight_dtype(op: str, value: torch.Tensor | QuantizedWeight, x: torch.Tensor) -> None:
    """`same_dtype` as x of a base weight, which autocast would cast; a quantized one has none."""
    if isinstance(value, torch.Tensor) and value.dtype != x.dtype and not autocasts(x):
        same_dtype(op, "weight", value, x.dtype)


def same_dtype(op: str, name: str, value, dtype: torch.dtype, of: str = "x") -> None:
    """Refuse a large operand of another dtype: casting it at every call would cost the gain."""
    if isinstance(value, torch.Tensor) and value.dtype != dtype:
        raise TypeError(f"{op}: {name} is {value.dtype}, but {of} is {dtype}; cast one once")


def options(op: str, dropout_p: float, impl: str | None, activation: str = "identity") -> None:
    """Refuse a dropout outside [0, 1), an unknown path, an unknown activation."""
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p!r}")
    if impl is not None and impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl must be None or one of {IMPLEMENTATIONS}, got {impl!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}"
        )


def scale(op: str, value: object, like: torch.Tensor) -> None:
    """Refuse what is no number, no 0-d floating tensor on x's device and no pair of both."""
    number, part = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if part is None and isinstance(number, torch.Tensor):
        number, part = 1.0, number
    if part is not None:
        tensor(op, "scale", part, (), like)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(
            f"{op}: scale must be a float or a 0-d tensor, or a pair of these,"
            f" got {type(number).__name__}"
        )


def seed(op: str, value: object, like: torch.Tensor) -> None:
    """Refuse a seed that is neither None, an int, nor a one-element int64 tensor with x."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{op}: seed must fit 64 bits, got {value}")
        return
    fits = (
        isinstance(value, torch.Tensor)
        and value.dtype == torch.int64
        and value.numel() == 1
        and value.device == like.device
    )
    if not fits:
        raise TypeError(f"{op}: seed must be an int or a one-element int64 tensor on {like.device}")
