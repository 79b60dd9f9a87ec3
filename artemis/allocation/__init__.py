"""Ranks and widths by importance: who gets how many units, and tensors that really change size."""

from .allocate import set_dynamic_rank_allocation
from .report import ModuleAllocation, RankAllocation

__all__ = ["ModuleAllocation", "RankAllocation", "set_dynamic_rank_allocation"]
