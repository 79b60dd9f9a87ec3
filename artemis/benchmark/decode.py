"""`artemis bench decode`: reading a prompt and decoding after it, adapters unmerged."""

from collections.abc import Sequence

from .arms import ARMS
from .records import Record
from .session import Session
from .settings import Setting, checked_among, time_of

BASELINE = "full-bf16"


def run(session: Session, wanted: Sequence[Setting], rounds: int) -> list[Record]:
    """Measure every setting; a row for each of its arms, saved as it comes."""
    rows = []
    for setting in wanted:
        steps = setting.steps("decode")
        session.time(steps, checked_among(steps), rounds)
        session.time(setting.steps("prefill"), [], rounds)
        for row in rows_of(session, setting):
            session.save(row)
            rows.append(row)
    return rows


def rows_of(session: Session, setting: Setting) -> list[Record]:
    """The table's rows: tokens a second of both phases, and speed against the plain models."""
    rows = []
    for arm in setting.arms:
        row = {"kind": "row", "table": "decode", **setting.describe("decode"), "arm": arm}
        row["what"] = ARMS[arm].what.replace("full fine-tuning", "plain model")
        for phase, tokens in (("prefill", setting.tokens), ("decode", setting.batch)):
            time = time_of(session, setting, arm, phase)
            row |= {name: time[name] for name in ("failed", "gate") if name in time}
            if "ms" in time:
                row[phase] = {"ms": time["ms"]}
                row[phase]["tokens_per_second"] = round(1e3 * tokens / time["ms"]["p50"], 3)
        rows.append(row)
    for phase in ("prefill", "decode"):
        times = {row["arm"]: row[phase]["ms"]["p50"] for row in rows if phase in row}
        for row in rows:
            if phase in row:
                row[phase]["speedup"] = {
                    full: round(time / times[row["arm"]], 3)
                    for full, time in times.items() if ARMS[full].is_full
                }  # fmt: skip
    return rows
