"""Tensors in their places, as they were: by them a layer knows whether its constants still hold.

At inference a layer's constants are made at its first call and serve until a tensor that they were
made of has changed: each call compares the tensors, their storage and their version. Writes through
`.data` raise no version; what costs a pass over several positions nothing to speak of, a few
numbers of each tensor, is compared there as well.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad

#: Where a tensor is held: a dictionary of tensors, and the name in it.
Place = tuple[dict[str, torch.Tensor | None], str]
#: Numbers that are looked at along each dimension of a tensor, at least.
_LOOKED_AT = 4


class Source(NamedTuple):
    """A tensor in its place, as it was; holding its storage keeps its address from being reused."""

    holder: dict[str, torch.Tensor | None]
    name: str
    tensor: torch.Tensor | None
    version: int
    address: int
    storage: torch.UntypedStorage | None
    #: On a CPU some of the tensor's numbers: where they lie, and what they were.
    numbers: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, holder: dict[str, torch.Tensor | None], name: str) -> "Source":
        tensor = holder.get(name)
        if tensor is None:
            return cls(holder, name, None, 0, 0, None)
        version, storage = tensor._version, tensor.untyped_storage()
        numbers = _some_numbers(tensor)
        return cls(holder, name, tensor, version, tensor.data_ptr(), storage, numbers)


def _some_numbers(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A view of numbers spread over the tensor, and a copy; None on a GPU, which is not waited for.

    By steps along each dimension, since only that is a view for any strides.
    """
    if tensor.device.type != "cpu":
        return None
    steps = tuple(slice(None, None, max(1, size // _LOOKED_AT)) for size in tensor.shape)
    view = tensor.detach()[steps]
    return view, view.clone()


def sources_of(places: Iterable[Place]) -> tuple[Source, ...] | None:
    """What is at `places` now, the weight first; None where changes of it could not be seen.

    The weight may be missing (parametrized, perhaps); of inference tensors nobody counts changes.
    """
    places = list(places)
    tensors = [holder.get(name) for holder, name in places]
    if tensors[0] is None or any(t is not None and t.is_inference() for t in tensors):
        return None
    return tuple(Source.of(*place) for place in places)


def unchanged(module: nn.Module, sources: Sequence[Source]) -> bool:
    """Whether every tensor is in its place as it was, the weight in this very module.

    Copies that share a module's attributes (`nn.DataParallel` makes some) have other tensors.
    """
    holder = sources[0].holder
    if holder is not module._parameters and holder is not module._buffers:
        return False
    for holder, name, tensor, version, address, _, _ in sources:
        if holder.get(name) is not tensor:
            return False
        if tensor is None:
            continue
        if tensor._version != version or tensor.data_ptr() != address:
            return False
    return True


def same_numbers(sources: Iterable[Source]) -> bool:
    """Whether the numbers looked at are what they were; False where they were not looked at."""
    return all(
        tensor is None or (numbers is not None and torch.equal(*numbers))
        for _, _, tensor, _, _, _, numbers in sources
    )


def same(one: Source, other: Source) -> bool:
    """Whether both are one tensor in one state, wherever it is held."""
    alike = one.tensor is other.tensor and one.version == other.version
    alike = alike and one.address == other.address
    return alike and (one.numbers is None or torch.equal(one.numbers[1], other.numbers[1]))


def takes_constants(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether a call without gradients may run on constants of the module's tensors."""
    if type(x) is not torch.Tensor or x.device.type not in ("cpu", "cuda"):
        return False
    if torch.is_autocast_enabled(x.device.type):
        return False
    if forward_ad._current_level >= 0:  # a tensor may have a tangent, which constants would lose
        return False
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False  # sizes are tensors there, or x or an adapter's tensor has no address
    if "forward" in vars(module):  # accelerate sets it, and brings the weights for each call
        return False
    return "bias" in module._parameters  # a pruned one is made anew by each call


def is_at_hand(tensor: torch.Tensor | None) -> bool:
    """Whether the numbers can be read here: not offloaded to `meta`, nor sharded (a DTensor)."""
    return tensor is None or not (tensor.is_meta or hasattr(tensor, "placements"))


def is_captured(x: torch.Tensor) -> bool:
    """Whether a CUDA graph is being made: constants made inside would be there after its replay."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
