"""The README's picture: speed and memory of a training step, each arm beside full fine-tuning.

The numbers drawn stand in the file's description too, so that a test sees when it is behind them.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from artemis.benchmark.arms import ARMS, BASELINE
from artemis.benchmark.records import Record

from .command_tables import in_order
from .model_tables import (
    by_model,
    fastest,
    full,
    has,
    is_extrapolated,
    name_of,
    speedup,
    speedup_range,
)  # fmt: skip
from .promises import MEMORY, SPEED

SHOWN = ("peft", "hybrid", "hybrid-int8")
_WIDTH = 0.26  # of a bar, where a model has room 1


class Bar(NamedTuple):
    """One arm of one model: times as fast as full fine-tuning, and its share of the memory."""

    model: str
    arm: str
    speed: float
    low: float  # the ends of `speed`'s range where it was extrapolated, else `speed`
    high: float  # infinite where a time may be nothing
    memory: float | None


def bars(rows: Sequence[Record]) -> list[Bar]:
    """What is drawn of the rows of `artemis bench train`: models that ran eagerly."""
    eager = [row for row in in_order(rows) if not row.get("compiled")]
    return [
        _bar(name_of(by[BASELINE]), by, arm)
        for by in by_model(eager)
        if BASELINE in by
        for arm in SHOWN
        if has(by, arm)
    ]


def _bar(model: str, by: dict[str, Record], arm: str) -> Bar:
    speed = speedup(by, arm)
    low = high = speed
    own = fastest(by, arm)
    if is_extrapolated(own):
        low, high = speedup_range(full(by)["ms"], own["ms"])
    peaks = [row.get("memory", {}).get("peak") for row in (own, by[BASELINE])]
    return Bar(model, arm, speed, low, high, None if None in peaks else peaks[0] / peaks[1])


def description(drawn: Sequence[Bar]) -> str:
    """The numbers as they are read off the picture."""
    return json.dumps([[bar.model, bar.arm, *map(_rounded, bar[2:])] for bar in drawn])


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def draw(drawn: Sequence[Bar], path: Path) -> None:
    """Two panels, speed and memory, a group of bars for each model."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(bar.model for bar in drawn))
    figure = Figure((9.5, 3.4), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for number, arm in enumerate(SHOWN):
        style = {"width": _WIDTH, "color": f"C{(7, 0, 2)[number]}", "label": ARMS[arm].what}
        for bar in (bar for bar in drawn if bar.arm == arm):
            at = models.index(bar.model) + (number - 1) * _WIDTH
            speed.bar(at, bar.speed, **style)
            if bar.low < bar.speed < bar.high < math.inf:
                speed.plot([at, at], [bar.low, bar.high], color="#444", lw=0.8)
            if bar.memory is not None:
                memory.bar(at, 100 * bar.memory, **style)
            style.pop("label", None)  # one entry of the legend for all
    speed.set_title("training speed, × full fine-tuning", fontsize=10)
    memory.set_title("peak memory, % of full fine-tuning's", fontsize=10)
    lines = ((speed, SPEED, 0, "left"), (memory, 100 * (1 - MEMORY), 1, "right"))
    for axis, promised, side, align in lines:
        axis.axhline(promised, color="black", lw=0.8, ls="--")
        axis.text(
            side, promised, " promised ", fontsize=8, va="bottom", ha=align,
            transform=axis.get_yaxis_transform(),
        )  # fmt: skip
        axis.set_xticks(range(len(models)), models, fontsize=8, rotation=20, ha="right")
        axis.set_xlim(-0.55, len(models) - 0.45)
        axis.spines[["top", "right"]].set_visible(False)
    speed.axhline(1, color="#999", lw=0.8)
    figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    with rc_context({"svg.hashsalt": "artemis"}):  # the same bytes at each call
        figure.savefig(path, metadata={"Date": None, "Description": description(drawn)})
