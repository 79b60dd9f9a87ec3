"""Which base an adapter belongs to: class, name, sizes, and a fingerprint of the weights.

A packed weight counts by the one it was made from, and not at all where that is counted in
another module: quantizing does not make another base of it.
"""

import hashlib
from base64 import b64decode, b64encode
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn

from ..errors import AdapterError, listed
from ..layers.bank import BANK, AdapterBank, find_bank
from ..layers.packed import packed_modules, sample, sample_of
from ..layers.sources import is_at_hand
from ..paths import is_within

#: How the samples of a base are marked of which some were held in fp16.
_FP16 = "float16:"
#: Name -> shape and sample of a tensor.
Facts = dict[str, tuple[tuple[int, ...], torch.Tensor | None]]


@dataclass(frozen=True)
class BaseIdentity:
    """The facts of a base model that its adapter file records."""

    class_name: str
    name: str
    parameters: int
    fingerprint: str
    #: The numbers behind the fingerprint, as text; empty in files of older versions.
    samples: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        _numbers(self.samples)  # a ValueError where they are damaged

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as an adapter file's description holds them: without samples."""
        values = asdict(self)
        del values["samples"]
        return values

    def same_weights(self, other: "BaseIdentity") -> bool:
        """Whether both may be the same weights, in whatever dtypes the models are held.

        Rounded to fp16 first, a number may round to the next bf16, or, near zero, lose more.
        """
        if self.fingerprint == other.fingerprint:
            return True
        (rounded, mine), (other_rounded, theirs) = _numbers(self.samples), _numbers(other.samples)
        if rounded == other_rounded or mine.shape != theirs.shape:
            return False
        step = torch.maximum(mine.abs(), theirs.abs()) * 2**-7 + 2**-24
        return bool(((mine - theirs).abs() <= step).all())


def identify(model: nn.Module, heads: tuple[str, ...]) -> BaseIdentity:
    """Describe the base of `model`; `heads`, which train, count towards its size only."""
    values = _as_injected(facts(model), find_bank(model))
    parameters = sum(prod(shape) for shape, _ in values.values())
    values = {n: v for n, v in sorted(values.items()) if not is_within(n, heads)}
    if away := [name for name, (_, numbers) in values.items() if numbers is None]:
        raise AdapterError(
            f"{listed(away)}: the numbers, by which an adapter knows its base, are not here (on the"
            " meta device, or sharded); load the weights first"
        )
    return BaseIdentity(
        class_name=type(model).__name__,
        name=name_of(model),
        parameters=parameters,
        fingerprint=_fingerprint(values),
        samples=_text([numbers for _, numbers in values.values()]),
    )


def name_of(model: nn.Module) -> str:
    """What the base was loaded by, a path or a name on the Hub; "" where nothing says it."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def facts(model: nn.Module) -> Facts:
    """Shape and sample of each tensor of the base by name; None: its numbers are not here."""
    named = {n: p for n, p in model.named_parameters() if not n.startswith(f"{BANK}.")}
    tensors = named | _originals(model)
    values = {n: (tuple(t.shape), sample(t) if is_at_hand(t) else None) for n, t in tensors.items()}
    return values | {n: (s, v if is_at_hand(v) else None) for n, (s, v) in _packed(model).items()}


def _as_injected(values: Facts, bank: AdapterBank | None) -> Facts:
    """Of the tensors that the base had at injection those of now; where they are gone, of then.

    So it is the same base after it was offloaded or sharded, and under another adapter.
    """
    if bank is None:
        return values
    here = {name: fact for name, fact in values.items() if fact[1] is not None}
    return {name: here.get(name, fact) for name, fact in bank.base.items()}


def _packed(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.Tensor]]:
    """Shape and sample that packed weights had before, a tied one's left out."""
    found = {}
    for path, module in packed_modules(model):
        if module.packing.untied:
            continue
        for name, shape in module.packed_shapes().items():
            found[f"{path}.{name}"] = shape, getattr(module, sample_of(name))
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
    """Hash names, shapes and some values of each tensor, the same on any device."""
    digest = hashlib.blake2b(digest_size=16)
    for name, (shape, values) in tensors.items():
        digest.update(f"{name} {shape}\n".encode())
        digest.update(_bytes(values))
    return digest.hexdigest()


def _bytes(values: torch.Tensor) -> bytes:
    """In bf16, so that a base loaded in bf16 is known as the one saved in fp32."""
    values = values.to(torch.float32).to(torch.bfloat16).cpu()
    return values.view(torch.int16).numpy().tobytes()


def _text(samples: list[torch.Tensor]) -> str:
    mark = _FP16 if any(values.dtype == torch.float16 for values in samples) else ""
    return mark + b64encode(b"".join(map(_bytes, samples))).decode()


def _numbers(text: str) -> tuple[bool, torch.Tensor]:
    """Whether some were held in fp16, and the numbers that `_text` wrote, in fp32."""
    data = bytearray(b64decode(text.removeprefix(_FP16), validate=True))
    values = torch.frombuffer(data, dtype=torch.bfloat16) if data else torch.zeros(0)
    return text.startswith(_FP16), values.float()
