"""The bank: every adapter tensor of a model, each exactly once, registered on the model.

Adapted modules hold no tensors; they look theirs up here at each forward. So a shared tensor has
one entry in `state_dict`, and no name of the base changes.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..config import HybridAdapterConfig
from ..errors import AdapterError
from ..plan import Plan, SiteSpec
from .frozen import Casts

if TYPE_CHECKING:
    from .sites import Site

#: Name under which the bank is registered on the model, and prefix of its tensors' names.
BANK = "hybrid_adapter"
#: Of the bank: stands in `state_dict` while the base's weights hold the adapter.
MERGED = "merged"
#: What a tensor is for: one table of the bank each.
ROLES = ("lora_a", "lora_b", "down", "up", "bias_down", "bias_up", "gain")
#: Of one module: role -> key in the role's table, and the shape of the part that is used.
Layout = dict[str, tuple[str, tuple[int, ...]]]


def site_tensors(site: SiteSpec, config: HybridAdapterConfig) -> Layout:
    """The tensors that `site` uses, as large as it uses them.

    Shared: LoRA's A and the bottleneck's down and up. Own to each module: B, biases and a gain.
    """
    own, size = site.own_key, site.size
    wide = site.shared_key if config.shared_parameters else own
    if site.kind == "lora":
        tensors = {
            "lora_a": (wide, (size, site.in_features)),
            "lora_b": (own, (site.out_features, size)),
        }
    else:
        tensors = {
            "down": (wide, (size, site.out_features)),
            "up": (wide, (site.out_features, size)),
        }
        if config.adapter_bias:
            tensors["bias_down"] = (own, (size,))
            tensors["bias_up"] = (own, (site.out_features,))
    if config.shared_parameters:
        tensors["gain"] = (own, ())
    return tensors


def bank_shapes(
    sites: Iterable[SiteSpec], config: HybridAdapterConfig
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return role -> key -> shape of the bank: a shared tensor is as large as its largest use."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {role: {} for role in ROLES}
    for site in sites:
        for role, (key, shape) in site_tensors(site, config).items():
            known = shapes[role].get(key, shape)
            shapes[role][key] = tuple(map(max, known, shape))
    return shapes


def initial(role: str, shape: tuple[int, ...], init: str) -> torch.Tensor:
    """Return the first value of a tensor: fp32 on the CPU, so the same for a seed on any device."""
    tensor = torch.zeros(shape, dtype=torch.float32, device="cpu")  # whatever torch's defaults
    if role == "gain":
        return tensor.fill_(1.0)
    if role not in ("lora_a", "down"):
        return tensor
    if init in ("orthogonal", "svd"):  # svd: what the weights do not fill (see `initialization`)
        return nn.init.orthogonal_(tensor)
    if role == "down":
        return nn.init.normal_(tensor, std=0.02)
    if init == "gaussian":
        return nn.init.normal_(tensor, std=1 / shape[0])
    return nn.init.kaiming_uniform_(tensor, a=5**0.5)


class AdapterBank(nn.Module):
    """Adapter tensors in tables by role; keys are module paths, or `target/in x out` where shared.

    A module of rank r uses the first r rows of a shared A, whatever the others use; likewise the
    first units of a shared bottleneck. Tensors start at zero; `reset_parameters` draws them.
    """

    def __init__(self, config: HybridAdapterConfig, plan: Plan):
        super().__init__()
        self.config = config
        self.heads = plan.heads
        #: By module path; filled by injection.
        self.sites: dict[str, Site] = {}
        self.enabled = True
        #: What injection hung on the model's output head.
        self.head_hooks: tuple[RemovableHandle, ...] = ()
        #: Of its tensors, for inference.
        self.casts = Casts()
        #: The configuration had the model fused, not the user, whose fusing stays.
        self.fused_model = False
        #: Held in 8 bits: it computes, and can be neither trained nor written.
        self.for_use_only = False
        #: As modules, though only their `p` is read: so whoever sets every dropout reaches these.
        self.lora_dropout = nn.Dropout(config.lora_dropout)
        self.adapter_dropout = nn.Dropout(config.adapter_dropout)
        #: What the base was when the adapter was put in (`identity.facts`).
        self.base: dict[str, tuple[tuple[int, ...], torch.Tensor | None]] = {}
        #: Names of the base's parameters that required a gradient before injection.
        self.trained_before: tuple[str, ...] = ()
        for role, shapes in bank_shapes(plan.sites, config).items():
            table = nn.ParameterDict()
            for key, shape in shapes.items():
                table[key] = nn.Parameter(torch.zeros(shape))
            setattr(self, role, table)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A and down from torch's CPU generator; B, up and biases are zero, gains one.

        A: Kaiming-uniform with a = √5, or normal of deviation 1/rank ("gaussian"); down: normal of
        deviation 0.02. "orthogonal": both with orthonormal rows; "svd": so until
        `initialization` has read the weights.
        """
        for role in ROLES:
            for tensor in getattr(self, role).values():
                tensor.copy_(initial(role, tuple(tensor.shape), self.config.init))

    def tensor(self, role: str, key: str) -> torch.Tensor:
        """Entry `key` of a table.

        `getattr(self, role)[key]` is that too, by two searches through attributes of modules, which
        every layer would make dozens of times a step.
        """
        table = self._modules[role]
        tensor = table._parameters.get(key)  # in 8 bits a table has no parameters
        return table[key] if tensor is None else tensor

    def tensors(self, layout: Layout) -> dict[str, torch.Tensor]:
        """Return role -> tensor, cut to the part that is used."""
        return {
            role: _leading(self.tensor(role, key), shape) for role, (key, shape) in layout.items()
        }

    def places(self, role: str, key: str) -> list[tuple[dict, str]]:
        """Where entry `key` of a table is stored: dictionaries of tensors, and names in them."""
        table = self._modules[role]
        if isinstance(table, nn.ParameterDict):
            return [(table._parameters, key)]
        return table.places(key)

    @property
    def device(self) -> torch.device:
        """Where its tensors are; held in 8 bits without biases and gains, all are buffers."""
        return next(chain(self.parameters(), self.buffers())).device

    def mark_merged(self, merged: bool) -> None:
        """Have `state_dict` say whether the base's weights hold the adapter.

        So torch refuses such a state for a model that is not merged, where the adapter would count
        twice, and the other way round, whatever the state was stored in.
        """
        if merged:
            self.register_buffer(MERGED, torch.ones((), dtype=torch.uint8, device=self.device))
        else:
            self._buffers.pop(MERGED, None)

    def forget(self) -> None:
        """Drop all that was worked out for inference: memory, never results."""
        self.casts.clear()
        for site in self.sites.values():
            site.frozen = None

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        self.forget()
        return super()._apply(fn, recurse)

    def plan(self) -> Plan:
        """What is adapted now."""
        return Plan(tuple(site.spec for site in self.sites.values()), self.heads)


def check_writable(bank: AdapterBank, what: str) -> None:
    """Raise `AdapterError` where the bank's tensors cannot take or give exact values."""
    if bank.for_use_only:
        raise AdapterError(
            f"the adapter is held in 8 bits, for use only: it cannot be {what}; allowed:"
            " adapter_bits 16 or 32"
        )


def _leading(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tensor.shape == shape:
        return tensor
    return tensor[tuple(slice(size) for size in shape)]


def find_bank(model: nn.Module) -> AdapterBank | None:
    """The bank of `model`, or None where it has no hybrid adapter."""
    bank = getattr(model, BANK, None)
    return bank if isinstance(bank, AdapterBank) else None
