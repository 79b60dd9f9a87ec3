"""`artemis bench train`: a training step of whole models by every arm, end to end."""

from collections.abc import Sequence

from .arms import ARMS, BASELINE
from .flops import training_flops
from .footprint import memory_of
from .models import architecture
from .records import Record
from .session import Session
from .settings import Setting, checked_among, time_of


def run(session: Session, wanted: Sequence[Setting], rounds: int) -> list[Record]:
    """Measure every setting; a row for each of its arms, saved as it comes."""
    rows = []
    for setting in wanted:
        steps = setting.steps("train")
        session.time(steps, checked_among(steps), rounds)
        if not setting.compiled:  # the compiler's own memory would count
            session.measure_memory(setting.steps("memory"))
        for row in rows_of(session, setting):
            session.save(row)
            rows.append(row)
    return rows


def rows_of(session: Session, setting: Setting) -> list[Record]:
    """The table's rows: times from the cells, and everything relative to full fine-tuning."""
    rows = []
    for arm in setting.arms:
        row = {"kind": "row", "table": "train", **setting.describe("train"), "arm": arm}
        row |= {"what": ARMS[arm].what, **time_of(session, setting, arm, "train")}
        rows.append(row | ({} if setting.compiled else memory_of(session, setting, arm)))
    times = {row["arm"]: row["ms"]["p50"] for row in rows if "ms" in row}
    for row in rows:
        if (ms := times.get(row["arm"])) is None:
            continue
        row["samples_per_second"] = round(1e3 * setting.batch / ms, 4)
        row["speedup"] = {
            full: round(time / ms, 3) for full, time in times.items() if ARMS[full].is_full
        }
        row["flops_relative"] = round(_flops(setting, row["arm"]) / _flops(setting, BASELINE), 4)
        if BASELINE in times:
            row["device_seconds_relative"] = round(ms / times[BASELINE], 4)
    return rows


def _flops(setting: Setting, arm: str) -> int:
    return training_flops(arm, architecture(setting.model), setting.batch, setting.sequence)
