"""What an allocation did, as a table and as plain values."""

import os
from dataclasses import asdict, dataclass
from typing import Any

from ..text_table import aligned


@dataclass(frozen=True)
class ModuleAllocation:
    """One module: its size (LoRA rank or bottleneck width) before and after.

    `cost`: the parameters of its units now, as if it shared none. `error`: how far its adapter's
    product is from what it was, relative to it (0 where nothing was lost).
    """

    path: str
    kind: str
    score: float
    before: int
    after: int
    cost: int
    error: float


@dataclass(frozen=True)
class RankAllocation:
    """What `set_dynamic_rank_allocation` did; printed, a table.

    `budget` and `cost` count the parameters of all units as if nothing were shared; `stored` counts
    every adapter parameter that exists, a shared one once, and `stored_before` those before.
    """

    modules: tuple[ModuleAllocation, ...]
    budget: int
    cost: int
    stored_before: int
    stored: int
    #: Why cost and budget differ by more than one unit; empty where they do not.
    note: str

    @property
    def sizes(self) -> dict[str, int]:
        """Module path -> rank or width."""
        return {module.path: module.after for module in self.modules}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON holds them."""
        return asdict(self)

    def plot(self, path: str | os.PathLike) -> None:
        """Draw scores and sizes, layers by modules, into an image file; needs matplotlib."""
        from ..plots import plot_allocation

        plot_allocation(self, path)

    def __str__(self) -> str:
        rows = [("module", "kind", "score", "before", "after", "cost", "error")]
        for m in self.modules:
            rows.append((
                m.path, m.kind, f"{m.score:.4f}", f"{m.before}", f"{m.after}", f"{m.cost:,}",
                f"{m.error:.4f}" if m.error else "-",
            ))  # fmt: skip
        lines = aligned(rows, left=2)
        lines.append(
            f"budget {self.budget:,}, spent {self.cost:,} (as if nothing were shared); stored"
            f" {self.stored:,}, before {self.stored_before:,}"
        )
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)
