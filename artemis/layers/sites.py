"""A site: the state of one adapted module, and the operation that it runs.

Sites are plain objects, not modules: they refer to the bank without registering it a second time,
and `deepcopy` and pickle follow that reference like any other.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from artemis_kernels import (
    FrozenAdapter,
    QuantizedWeight,
    adapter_linear,
    adapter_linear_group,
    bottleneck_adapter,
    lora_linear,
    lora_linear_group,
    new_seed,
)

from ..errors import AdapterError
from ..plan import SiteSpec
from .bank import AdapterBank, site_tensors
from .frozen import Frozen

if TYPE_CHECKING:
    from .groups import InputGroup

Weight = torch.Tensor | QuantizedWeight


@dataclass(eq=False)
class SharedSeed:
    """One dropout seed for all modules that read the same tensor.

    A member that still owes a use of the current seed takes it for the tensor that it was drawn
    for; any other draws a new one, which the rest then owe. So a forward draws once a group;
    activation checkpointing, which restores the generator, draws the same again, since nothing of
    an earlier forward has a part in it; and order, exceptions and skipped members do no harm.
    """

    size: int = 0
    #: Bit i is set while member i may still take `seed`.
    pending: int = 0
    seed: torch.Tensor | None = None
    #: The tensor that `seed` was drawn for; a compiled graph, which makes no weak references, keeps
    #: none.
    source: weakref.ref | None = field(default=None, repr=False)

    def join(self) -> int:
        """Add a member; return the bit that stands for it."""
        self.size += 1
        return 1 << (self.size - 1)

    def take(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """Return the seed for `member`, which reads x: one int64 element on its device."""
        compiling = torch.compiler.is_compiling()
        if self.pending & member and (compiling or self._is_for(x)):
            self.pending &= ~member
        else:
            self.seed = new_seed(x.device)
            self.pending = ((1 << self.size) - 1) & ~member
            self.source = None if compiling else weakref.ref(x)
        return self.seed

    def _is_for(self, x: torch.Tensor) -> bool:
        return self.source is not None and self.source() is x

    def take_for_all(self, device: torch.device) -> torch.Tensor:
        """Return a new seed for every member at once; none is owed afterwards."""
        self.seed, self.pending = new_seed(device), 0
        return self.seed

    def __getstate__(self) -> dict:
        return self.__dict__ | {"source": None}  # no tensor of a forward is part of a copy


@dataclass(eq=False)
class Site:
    """What an adapted module knows: what it is, where its tensors are, which mask it shares."""

    spec: SiteSpec
    bank: AdapterBank = field(repr=False)
    seeds: SharedSeed = field(repr=False)
    #: The parameters that folding changed, as they were, on the CPU, while the adapter is folded.
    original: dict[str, torch.Tensor] | None = field(default=None, repr=False)
    #: Modules that are computed together with this one, and this one's place among them.
    group: "InputGroup | None" = field(default=None, repr=False)
    place: int = field(default=0, repr=False)
    #: Of an output head: whether it ran where gradients are taken (`output_head`).
    called: bool = field(default=False, init=False, repr=False)
    #: What was worked out for inference; no part of a copy.
    frozen: Frozen | None = field(default=None, init=False, repr=False)
    member: int = field(init=False, repr=False)
    #: `site_tensors` of this site: worked out once, not at each forward.
    layout: dict[str, tuple[str, tuple[int, ...]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.member = self.seeds.join()
        self.layout = site_tensors(self.spec, self.bank.config)

    @property
    def active(self) -> bool:
        """Whether the module must add its adapter to what the base computes."""
        return self.original is None and self.bank.enabled

    def versions(self) -> tuple | None:
        """Equal while this site's tensors are the same in value and size; None while compiling."""
        if torch.compiler.is_compiling():
            return None
        if self.bank.for_use_only:
            return (self.layout,)  # nothing writes the values, and reading them would unpack them
        tensors = (getattr(self.bank, role)[key] for role, (key, _) in self.layout.items())
        return self.layout, *(None if t.is_inference() else t._version for t in tensors)

    def forget(self) -> None:
        """Drop what was worked out for inference, this module's and what all share."""
        if self.frozen is not None:
            self.frozen = None
            self.bank.casts.clear()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"frozen": None}

    def _factor(self, factor: float, gain: torch.Tensor | None) -> float | torch.Tensor:
        if gain is None:
            return factor
        # In 16 bits their product would be another factor: 0.3 in bf16 is 0.3008.
        gain = gain.to(torch.promote_types(gain.dtype, torch.float32))
        return gain if factor == 1 else factor * gain

    def _mask(self, p: float, training: bool, x: torch.Tensor) -> dict:
        """Arguments for dropout: none outside training."""
        if not training or p == 0.0:
            return {}
        return {"dropout_p": p, "seed": self.seeds.take(self.member, x)}

    def _group_mask(self, p: float, training: bool, x: torch.Tensor) -> dict:
        """The same for all members of a group."""
        if not training or p == 0.0:
            return {}
        return {"dropout_p": p, "seed": self.seeds.take_for_all(x.device)}

    def _shares_mask(self, p: float, training: bool) -> bool:
        return not training or p == 0.0 or self.bank.config.dropout_mask_sharing == "input"


class LoRASite(Site):
    """LoRA on a linear layer."""

    def linear(
        self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, training: bool
    ) -> torch.Tensor:
        """x [..., in] -> [..., out], for weight (out, in): of any strides, or packed."""
        config, tensors = self.bank.config, self.bank.tensors(self.layout)
        return lora_linear(
            x,
            weight,
            tensors["lora_a"],
            tensors["lora_b"],
            self._factor(config.scaling_factor, tensors.get("gain")),
            bias=bias,
            impl=config.impl,
            **self._mask(self.bank.lora_dropout.p, training, x),
        )

    def constants(self) -> tuple:
        """What the adapter's constants depend on beside tensors."""
        return (self.bank.config.scaling_factor,)

    def frozen_adapter(
        self,
        weight: Weight,
        bias: torch.Tensor | None,
        tensors: dict[str, torch.Tensor],
        dtype: torch.dtype,
    ) -> FrozenAdapter:
        """The constants of `linear` for the bank's `tensors`, in `dtype`."""
        scale = self._factor(self.bank.config.scaling_factor, tensors.get("gain"))
        return FrozenAdapter.lora(
            tensors["lora_a"], tensors["lora_b"], scale, bias=bias, dtype=dtype
        )

    def can_join(self, training: bool) -> bool:
        """Whether one operation may serve all modules that read this one's input."""
        return self._shares_mask(self.bank.lora_dropout.p, training)

    def linear_group(
        self,
        x: torch.Tensor,
        sites: Sequence["LoRASite"],
        weights: Sequence[Weight],
        biases: Sequence[torch.Tensor | None],
        training: bool,
    ) -> tuple[torch.Tensor, ...]:
        """`linear` of every site, weight and bias in one operation."""
        config = self.bank.config
        tensors = [site.bank.tensors(site.layout) for site in sites]
        return lora_linear_group(
            x,
            weights,
            [t["lora_a"] for t in tensors],
            [t["lora_b"] for t in tensors],
            [self._factor(config.scaling_factor, t.get("gain")) for t in tensors],
            biases=biases,
            impl=config.impl,
            **self._group_mask(self.bank.lora_dropout.p, training, x),
        )


class BottleneckSite(Site):
    """A bottleneck on the output of a linear layer."""

    def linear(
        self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, training: bool
    ) -> torch.Tensor:
        """x [..., in] -> [..., out], for weight (out, in): of any strides, or packed."""
        config, tensors = self.bank.config, self.bank.tensors(self.layout)
        return adapter_linear(
            x,
            weight,
            tensors["down"],
            tensors["up"],
            bias=bias,
            bias_down=tensors.get("bias_down"),
            bias_up=tensors.get("bias_up"),
            activation=config.activation,
            scale=self._factor(config.adapter_scale, tensors.get("gain")),
            impl=config.impl,
            **self._mask(self.bank.adapter_dropout.p, training, x),
        )

    def constants(self) -> tuple:
        """What the adapter's constants depend on beside tensors."""
        return self.bank.config.adapter_scale, self.bank.config.activation

    def frozen_adapter(
        self,
        weight: Weight,
        bias: torch.Tensor | None,
        tensors: dict[str, torch.Tensor],
        dtype: torch.dtype,
    ) -> FrozenAdapter:
        """The constants of `linear` for the bank's `tensors`, in `dtype`."""
        config = self.bank.config
        return FrozenAdapter.bottleneck(
            weight,
            tensors["down"],
            tensors["up"],
            bias=bias,
            bias_down=tensors.get("bias_down"),
            bias_up=tensors.get("bias_up"),
            activation=config.activation,
            scale=self._factor(config.adapter_scale, tensors.get("gain")),
            dtype=dtype,
        )

    def can_join(self, training: bool) -> bool:
        """Whether one operation may serve all modules that read this one's input.

        What is shared shows in the backward; where none will come, modules stay on their own. In
        training one comes even to a pass without gradients: checkpointing's first.
        """
        shares = self._shares_mask(self.bank.adapter_dropout.p, training)
        return shares and (training or torch.is_grad_enabled())

    def linear_group(
        self,
        x: torch.Tensor,
        sites: Sequence["BottleneckSite"],
        weights: Sequence[Weight],
        biases: Sequence[torch.Tensor | None],
        training: bool,
    ) -> tuple[torch.Tensor, ...]:
        """`linear` of every site, weight and bias in one operation."""
        config = self.bank.config
        tensors = [site.bank.tensors(site.layout) for site in sites]
        return adapter_linear_group(
            x,
            weights,
            [t["down"] for t in tensors],
            [t["up"] for t in tensors],
            biases=biases,
            biases_down=[t.get("bias_down") for t in tensors],
            biases_up=[t.get("bias_up") for t in tensors],
            activation=config.activation,
            scales=[self._factor(config.adapter_scale, t.get("gain")) for t in tensors],
            impl=config.impl,
            **self._group_mask(self.bank.adapter_dropout.p, training, x),
        )


def with_first(output: tuple, first: torch.Tensor) -> tuple:
    """`output` with another first member; a named tuple keeps its class."""
    if hasattr(output, "_fields"):
        return type(output)(first, *output[1:])
    return (first, *output[1:])


class BlockSite(Site):
    """A bottleneck on the output of a block, as the block's forward hook."""

    #: Takes the hook out again.
    hook: RemovableHandle | None = None

    def __call__(self, module: nn.Module, args: tuple, output):
        """Adapt `output`: a tensor [..., hidden], or a tuple that starts with one."""
        if not self.active:
            return output
        if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
            return with_first(output, self._adapt(output[0], module.training))
        if isinstance(output, torch.Tensor):
            return self._adapt(output, module.training)
        raise TypeError(
            f"{self.spec.path} returned a {type(output).__name__}; a bottleneck on a block needs a"
            " tensor or a tuple that starts with one"
        )

    def _adapt(self, x: torch.Tensor, training: bool) -> torch.Tensor:
        if x.shape[-1] != self.spec.in_features:
            raise AdapterError(
                f"{self.spec.path} returned {x.shape[-1]} features, and its bottleneck is for"
                f" {self.spec.in_features}, the hidden_size of its configuration; leave it out, or"
                " name its linear layers instead"
            )
        config, tensors = self.bank.config, self.bank.tensors(self.layout)
        return bottleneck_adapter(
            x,
            tensors["down"],
            tensors["up"],
            bias_down=tensors.get("bias_down"),
            bias_up=tensors.get("bias_up"),
            activation=config.activation,
            scale=self._factor(config.adapter_scale, tensors.get("gain")),
            impl=config.impl,
            **self._mask(self.bank.adapter_dropout.p, training, x),
        )


SITES = {"lora": LoRASite, "bottleneck": BottleneckSite, "block": BlockSite}
