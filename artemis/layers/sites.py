"""A site: the state of one adapted module, and the operation that it runs.

Sites are plain objects, not modules: they refer to the bank without registering it a second time,
and `deepcopy` and pickle follow that reference like any other.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from artemis_kernels import (
    FrozenAdapter,
    adapter_linear,
    adapter_linear_group,
    lora_linear,
    lora_linear_group,
)

from ..plan import SiteSpec
from .bank import AdapterBank, Layout, site_tensors
from .frozen import Frozen
from .linear import Weight
from .seeds import SharedSeed

if TYPE_CHECKING:
    from .groups import InputGroup

#: Role -> tensor of one module, as `AdapterBank.tensors` gives them.
Tensors = dict[str, torch.Tensor]


@dataclass(eq=False)
class Site(ABC):
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
    layout: Layout = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.member = self.seeds.join()
        self.layout = site_tensors(self.spec, self.bank.config)

    @property
    def active(self) -> bool:
        """Whether the module must add its adapter to what the base computes."""
        return self.original is None and self.bank.enabled

    @property
    @abstractmethod
    def factor(self) -> float:
        """What the adapter's product is multiplied by, the gain apart."""

    @property
    @abstractmethod
    def dropout_p(self) -> float:
        """The rate of dropout in training, as it stands now."""

    def tensors(self) -> Tensors:
        """The bank's tensors of this site."""
        return self.bank.tensors(self.layout)

    def versions(self) -> tuple | None:
        """Equal while this site's tensors are the same in value and size; None while compiling."""
        if torch.compiler.is_compiling():
            return None
        if self.bank.for_use_only:
            return (self.layout,)  # nothing writes the values, and reading them would unpack them
        tensors = [self.bank.tensor(role, key) for role, (key, _) in self.layout.items()]
        return self.layout, *[None if t.is_inference() else t._version for t in tensors]

    def forget(self) -> None:
        """Drop what was worked out for inference, this module's and what all share."""
        if self.frozen is not None:
            self.frozen = None
            self.bank.casts.clear()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"frozen": None}

    def scale(self, tensors: Tensors) -> float | tuple[float, torch.Tensor]:
        """The factor, and the gain where there is one: the operations multiply them."""
        factor, gain = self.factor, tensors.get("gain")
        if gain is None:
            return factor
        # In 16 bits their product would be another factor: 0.3 in bf16 is 0.3008.
        return factor, gain.to(torch.promote_types(gain.dtype, torch.float32))

    def own_mask(self, training: bool, x: torch.Tensor) -> dict[str, Any]:
        """An operation's arguments for dropout; none outside training."""
        if not self._draws(training):
            return {}
        return {"dropout_p": self.dropout_p, "seed": self.seeds.take(self.member, x)}

    def group_mask(self, training: bool, x: torch.Tensor) -> dict[str, Any]:
        """`own_mask` for all members of a group at once."""
        if not self._draws(training):
            return {}
        return {"dropout_p": self.dropout_p, "seed": self.seeds.take_for_all(x.device)}

    def shares_mask(self, training: bool) -> bool:
        """Whether those that read this module's input have one mask, if any is drawn."""
        return not self._draws(training) or self.bank.config.dropout_mask_sharing == "input"

    def _draws(self, training: bool) -> bool:
        return training and self.dropout_p != 0.0


class LoRASite(Site):
    """LoRA on a linear layer."""

    @property
    def factor(self) -> float:
        return self.bank.config.scaling_factor

    @property
    def dropout_p(self) -> float:
        return self.bank.lora_dropout.p

    def linear(
        self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, training: bool
    ) -> torch.Tensor:
        """x [..., in] -> [..., out], for weight (out, in): of any strides, or packed."""
        tensors = self.tensors()
        return lora_linear(
            x,
            weight,
            tensors["lora_a"],
            tensors["lora_b"],
            self.scale(tensors),
            bias=bias,
            impl=self.bank.config.impl,
            **self.own_mask(training, x),
        )

    def frozen_adapter(
        self, weight: Weight, bias: torch.Tensor | None, tensors: Tensors, dtype: torch.dtype
    ) -> FrozenAdapter:
        """The constants of `linear` for the site's `tensors`, in `dtype`."""
        return FrozenAdapter.lora(
            tensors["lora_a"], tensors["lora_b"], self.scale(tensors), bias=bias, dtype=dtype
        )

    def can_join(self, training: bool) -> bool:
        """Whether one operation may serve all modules that read this one's input."""
        return self.shares_mask(training)

    def linear_group(
        self,
        x: torch.Tensor,
        sites: Sequence["LoRASite"],
        weights: Sequence[Weight],
        biases: Sequence[torch.Tensor | None],
        training: bool,
    ) -> tuple[torch.Tensor, ...]:
        """`linear` of every site, weight and bias in one operation."""
        tensors = [site.tensors() for site in sites]
        return lora_linear_group(
            x,
            weights,
            [t["lora_a"] for t in tensors],
            [t["lora_b"] for t in tensors],
            [self.scale(t) for t in tensors],
            biases=biases,
            impl=self.bank.config.impl,
            **self.group_mask(training, x),
        )


class Bottleneck(Site):
    """A bottleneck, on a linear layer's output or on a block's."""

    @property
    def factor(self) -> float:
        return self.bank.config.adapter_scale

    @property
    def dropout_p(self) -> float:
        return self.bank.adapter_dropout.p

    def arguments(self, tensors: Tensors) -> dict[str, Any]:
        """What every operation with a bottleneck takes: by the names of the tensors' roles."""
        parts = {role: tensor for role, tensor in tensors.items() if role != "gain"}
        return {
            **parts,
            "activation": self.bank.config.activation,
            "scale": self.scale(tensors),
        }


class BottleneckSite(Bottleneck):
    """A bottleneck on the output of a linear layer."""

    def linear(
        self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, training: bool
    ) -> torch.Tensor:
        """x [..., in] -> [..., out], for weight (out, in): of any strides, or packed."""
        return adapter_linear(
            x,
            weight,
            bias=bias,
            impl=self.bank.config.impl,
            **self.arguments(self.tensors()),
            **self.own_mask(training, x),
        )

    def frozen_adapter(
        self, weight: Weight, bias: torch.Tensor | None, tensors: Tensors, dtype: torch.dtype
    ) -> FrozenAdapter:
        """The constants of `linear` for the site's `tensors`, in `dtype`."""
        return FrozenAdapter.bottleneck(weight, bias=bias, dtype=dtype, **self.arguments(tensors))

    def can_join(self, training: bool) -> bool:
        """Whether one operation may serve all modules that read this one's input.

        What is shared shows in the backward; where none will come, modules stay on their own. In
        training one comes even to a pass without gradients: checkpointing's first.
        """
        return self.shares_mask(training) and (training or torch.is_grad_enabled())

    def linear_group(
        self,
        x: torch.Tensor,
        sites: Sequence["BottleneckSite"],
        weights: Sequence[Weight],
        biases: Sequence[torch.Tensor | None],
        training: bool,
    ) -> tuple[torch.Tensor, ...]:
        """`linear` of every site, weight and bias in one operation."""
        tensors = [site.tensors() for site in sites]
        return adapter_linear_group(
            x,
            weights,
            [t["down"] for t in tensors],
            [t["up"] for t in tensors],
            biases=biases,
            biases_down=[t.get("bias_down") for t in tensors],
            biases_up=[t.get("bias_up") for t in tensors],
            activation=self.bank.config.activation,
            scales=[self.scale(t) for t in tensors],
            impl=self.bank.config.impl,
            **self.group_mask(training, x),
        )
