"""`artemis bench memory`: the peak of a training step, states and activations apart."""

from collections.abc import Sequence

from .arms import ARMS
from .extrapolation import total
from .records import Record
from .session import Session
from .settings import Setting
from .steps import Step


def run(session: Session, wanted: Sequence[Setting]) -> list[Record]:
    """Measure every setting, each arm in its own process; a row for each, saved as it comes."""
    rows = []
    for setting in wanted:
        session.measure_memory(setting.steps("memory"))
        found = {arm: memory_of(session, setting, arm) for arm in setting.arms}
        for arm, memory in found.items():
            row = {"kind": "row", "table": "memory", **setting.describe("memory"), "arm": arm}
            row |= {"what": ARMS[arm].what, **memory}
            if "memory" not in memory:
                row["failed"] = "does not fit into memory"
            else:
                peak = memory["memory"]["peak"]
                row["peak_of"] = {
                    full: round(peak / other["memory"]["peak"], 4)
                    for full, other in found.items()
                    if ARMS[full].is_full and "memory" in other
                }
            session.save(row)
            rows.append(row)
    return rows


def memory_of(session: Session, setting: Setting, arm: str) -> Record:
    """`memory`: bytes of states, activations and peak; nothing where a cell was not measured."""
    estimate = setting.estimate("memory")
    found = {cell: session.value(Step("memory", arm, cell), "memory") for cell in estimate}
    if None in found.values():
        return {}
    states, peak = (
        int(total(estimate, {cell: memory[name] for cell, memory in found.items()}))
        for name in ("states", "peak")
    )
    return {"memory": {"states": states, "activations": max(peak - states, 0), "peak": peak}}
