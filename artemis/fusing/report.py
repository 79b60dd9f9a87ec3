"""What fusing a model's operations did, counted and in words."""

from dataclasses import dataclass
from typing import NamedTuple


class Left(NamedTuple):
    """Modules of one class that were left as they were, for one reason."""

    class_name: str
    count: int
    reason: str


@dataclass(frozen=True)
class FusionReport:
    """What `fuse_model` found; printed, in words.

    Attributes:
        norms, gates, rotary: modules that are fused now: RMS norms, gated MLPs, and attentions
            with their rotary embedding.
        attention: whether the model attends by `artemis_kernels.attention` now.
        left: modules that resemble these and are as they were: `(class_name, count, reason)`.
    """

    norms: int
    gates: int
    rotary: int
    attention: bool
    left: tuple[Left, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.norms} norms, {self.gates} gated MLPs and {self.rotary} rotary embeddings fused"
        ]
        if self.attention:
            lines.append("  attention: artemis, where it was sdpa")
        lines += [
            f"  {class_name} ({count}), as it was: {reason}"
            for class_name, count, reason in self.left
        ]
        return "\n".join(lines)
