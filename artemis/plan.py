"""What is adapted: the modules and how, free of tensors, so that a file can hold it too."""

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["lora", "bottleneck", "block"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class SiteSpec:
    """One adapted module.

    `kind`: LoRA on a linear layer, a bottleneck on a linear layer's output, or a bottleneck on a
    block's output. `target` is the entry of `target_modules` that it matched, part of the key by
    which parameters are shared. `size` is the LoRA rank or the bottleneck's width.
    """

    path: str
    kind: Kind
    target: str
    in_features: int
    out_features: int
    size: int

    @property
    def own_key(self) -> str:
        """Key of the tensors that belong to this module alone (a module name holds no dots)."""
        return self.path.replace(".", "/")

    @property
    def shared_key(self) -> str:
        """Key of the tensors shared by every module of one target and shape."""
        return f"{self.target.replace('.', '/')}/{self.in_features}x{self.out_features}"


@dataclass(frozen=True)
class Plan:
    """Every adapted module, and the heads that train and are saved as they are."""

    sites: tuple[SiteSpec, ...]
    heads: tuple[str, ...] = ()
