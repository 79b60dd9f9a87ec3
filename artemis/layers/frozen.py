"""Adapted layers at inference: what their tensors stand for, worked out once and kept.

Outside training and without gradients a layer's constants (the adapter in x's dtype, `D W`, biases
added up) are made at its first call and serve until something they were made of has changed
(`sources.py`). A call over several positions sees uncounted changes too, and on a GPU, where that
would have to be waited for, takes the usual operation. Copies of a model start without them, and
whatever moves, casts, packs or trains it drops them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from artemis_kernels import FrozenLinear

from .linear import weight_of
from .packed import is_packed
from .packed_linear import PARTS
from .sources import (
    Place,
    Source,
    is_captured,
    same,
    same_numbers,
    sources_of,
    takes_constants,
    unchanged,
)

if TYPE_CHECKING:
    from .sites import Site


class Frozen(NamedTuple):
    """A layer at inference, and what it was made of."""

    sources: tuple[Source, ...]
    conditions: tuple
    linear: FrozenLinear | None  # None: the adapter adds nothing


class Casts:
    """A bank's tensors in another dtype, each once for all layers that share it."""

    def __init__(self) -> None:
        self._made: dict[tuple, tuple[list[Source], torch.Tensor]] = {}

    def clear(self) -> None:
        self._made.clear()

    def get(
        self, key: tuple, sources: list[Source], tensor: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """`tensor`, named by `key` and made of `sources`, in `dtype` and contiguous."""
        key = (*key, tensor.shape, dtype)
        known, cast = self._made.get(key, ([], None))
        if cast is None or not all(map(same, known, sources)):
            cast = tensor.detach().to(dtype).contiguous()
            self._made[key] = sources, cast
        return cast

    def __reduce__(self) -> tuple:
        return Casts, ()  # a copy of a model makes its own


def output(
    module: nn.Module, x: torch.Tensor, site: "Site", base: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor | None:
    """The layer's output from its constants, or by `base` alone where the adapter adds nothing.

    None where the usual operation is to run.
    """
    if torch.compiler.is_compiling():
        return None
    if module.training or torch.is_grad_enabled():
        site.forget()  # an optimizer may follow, and may write through `.data`, which nobody counts
        return None
    ready = _ready(module, x, site)
    if ready is None:
        return None
    return base(x) if ready.linear is None else ready.linear(x)


def _ready(module: nn.Module, x: torch.Tensor, site: "Site") -> Frozen | None:
    config = site.bank.config
    if not config.cache_constants or config.impl == "reference" or not takes_constants(module, x):
        return None
    conditions = (x.dtype, config.impl, id(site.layout), site.factor, config.activation)
    several = x.dim() > 1 and x.shape[-2] > 1  # positions: no step of decoding
    if several and x.is_cuda:
        site.forget()
        return None
    ready = site.frozen
    holds = ready is not None and ready.conditions == conditions
    if holds and unchanged(module, ready.sources) and (not several or same_numbers(ready.sources)):
        return ready
    site.frozen = None
    sources = sources_of(_places(module, site))
    if sources is None or is_captured(x):
        return None
    made = Frozen(sources, conditions, _linear(module, x.dtype, site))
    site.frozen = made  # another thread's may take its place at once
    return made


def _places(module: nn.Module, site: "Site") -> list[Place]:
    """Where all tensors are that the output depends on, the weight first."""
    if is_packed(module):
        places = [(module._buffers, name) for name in PARTS]
    else:
        places = [(module._parameters, "weight")]
    places.append((module._parameters, "bias"))
    for role, (key, _) in site.layout.items():
        places += site.bank.places(role, key)
    return places


def _linear(module: nn.Module, dtype: torch.dtype, site: "Site") -> FrozenLinear | None:
    bank, layout = site.bank, site.layout
    given = site.tensors()
    if _adds_nothing(given):
        return None
    for role in ("lora_a", "down", "up"):
        if role in layout:
            key = layout[role][0]
            sources = [Source.of(*place) for place in bank.places(role, key)]
            given[role] = bank.casts.get((role, key), sources, given[role], dtype)
    weight = weight_of(module)
    if isinstance(weight, torch.Tensor):
        weight = weight.detach()
    adapter = site.frozen_adapter(weight, module.bias, given, dtype)
    return FrozenLinear(weight, adapter, impl=bank.config.impl)


def _adds_nothing(given: dict[str, torch.Tensor]) -> bool:
    """Whether the adapter is as good as fresh; a GPU is not waited for to know it."""
    last = [given[role] for role in ("lora_b", "up", "bias_up") if role in given]
    return all(tensor.device.type == "cpu" and not tensor.any() for tensor in last)
