"""Which steps share a process: as many, one after the other, as memory holds together."""

from collections.abc import Collection, Sequence

from .memory import available_memory
from .steps import Step

_SHARE = 0.8  # of what is available: what the steps of one process may need together
_RESERVE = 1 << 30  # for Python and torch


def within_memory(steps: Sequence[Step], checked: Collection[Step]) -> list[list[Step]]:
    """Groups of steps in their order; one that needs more than its share has its own."""
    budget = _SHARE * available_memory() - _RESERVE
    groups: list[list[Step]] = []
    for step in steps:
        if groups and _needed([*groups[-1], step], checked) <= budget:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def obstacle(step: Step, checked: Collection[Step]) -> str | None:
    """Why a step cannot run even alone; None where it can."""
    needed, there = _needed([step], checked), available_memory() - _RESERVE
    if needed <= there:
        return None
    return f"needs about {needed / 1e9:.1f} GB, {there / 1e9:.1f} GB are available"


def _needed(group: Sequence[Step], checked: Collection[Step]) -> float:
    """Bytes of all its steps, and of the gate's reference, which one at a time has."""
    references = [step.reference_bytes for step in group if step in checked]
    return sum(step.estimated_bytes for step in group) + max(references, default=0)
