"""Which base an adapter belongs to: class, name, sizes, and a fingerprint of the weights.

A packed layer counts by the weight it was made from, and not at all where that is counted in
another module: quantizing does not make another base of it.
"""

import hashlib
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from .bank import BANK, find_bank
from .quantized_layers import SAMPLE, packed_layers, sample


@dataclass(frozen=True)
class BaseIdentity:
    """The facts of a base model that its adapter file records."""

    class_name: str
    name: str
    parameters: int
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as an adapter file holds them."""
        return asdict(self)


def identify(model: nn.Module, heads: tuple[str, ...]) -> BaseIdentity:
    """Describe the base of `model`; `heads`, which train, count towards its size only."""
    named = {n: p for n, p in model.named_parameters() if not n.startswith(f"{BANK}.")}
    trained = tuple(f"{head}." for head in heads)
    tensors = named | _originals(model)
    packed = _packed(model)
    values = {name: (tuple(t.shape), sample(t)) for name, t in tensors.items()} | packed
    return BaseIdentity(
        class_name=type(model).__name__,
        name=str(getattr(getattr(model, "config", None), "_name_or_path", "") or ""),
        parameters=sum(p.numel() for p in named.values())
        + sum(prod(shape) for shape, _ in packed.values()),
        fingerprint=_fingerprint({n: v for n, v in values.items() if not n.startswith(trained)}),
    )


def _packed(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.Tensor]]:
    """Shape and sample that the weights of packed layers had before, a tied one's left out."""
    found = {}
    for path, module in packed_layers(model):
        if module.packing.untied:
            continue
        shape = tuple(module.weight.shape)
        shape = shape if isinstance(module, nn.Linear) else shape[::-1]
        found[f"{path}.weight"] = shape, getattr(module, SAMPLE)
    return found


def _originals(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base's own values of those parameters that hold a merged adapter now."""
    bank = find_bank(model)
    sites = bank.sites.items() if bank else ()
    return {
        f"{path}.{name}": tensor
        for path, site in sites
        for name, tensor in (site.original or {}).items()
    }


def _fingerprint(tensors: dict[str, tuple[tuple[int, ...], torch.Tensor]]) -> str:
    """Hash names, shapes and some values of each tensor, the same on any device.

    Values count as bf16, so that a base loaded in bf16 is known as the one saved in fp32.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, (shape, values) in sorted(tensors.items()):
        values = values.to(torch.float32).to(torch.bfloat16).cpu()
        digest.update(f"{name} {shape}\n".encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
