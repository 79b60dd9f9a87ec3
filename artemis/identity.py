"""Which base an adapter belongs to: class, name, sizes, and a fingerprint of the weights."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .bank import BANK, find_bank

_SAMPLES = 16


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
    named = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not name.startswith(f"{BANK}.")
    }
    frozen = {
        name: parameter
        for name, parameter in named.items()
        if not name.startswith(tuple(f"{head}." for head in heads))
    }
    frozen.update(_originals(model))
    return BaseIdentity(
        class_name=type(model).__name__,
        name=str(getattr(getattr(model, "config", None), "_name_or_path", "") or ""),
        parameters=sum(parameter.numel() for parameter in named.values()),
        fingerprint=_fingerprint(frozen),
    )


def _originals(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base's own values of those parameters that hold a merged adapter now."""
    bank = find_bank(model)
    sites = bank.sites.items() if bank else ()
    return {
        f"{path}.{name}": tensor
        for path, site in sites
        for name, tensor in (site.original or {}).items()
    }


@torch.no_grad()
def _fingerprint(named: dict[str, torch.Tensor]) -> str:
    """Hash names, shapes and some values of each tensor, the same on any device.

    Values count as bf16, so that a base loaded in bf16 is known as the one saved in fp32.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(named.items()):
        values = tensor.detach().flatten()
        step = max(1, values.numel() // _SAMPLES) | 1  # odd, so as not to stay in one column
        sample = values[::step][:_SAMPLES].to(torch.float32).to(torch.bfloat16).cpu()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
