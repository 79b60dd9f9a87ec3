"""Pictures of what was measured: bars against peers, and operations under their roofline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from .records import Record

#: What the bars of a table show: the first of these that any row has.
_VALUES = {
    "train": (
        ("speed against full fine-tuning in bf16 autocast", ("speedup", "full-autocast")),
        ("samples a second", ("samples_per_second",)),
    ),
    "memory": (("peak memory of a training step, GB", ("memory", "peak")),),
    "decode": (("decoded tokens a second", ("decode", "tokens_per_second")),),
}


def require_matplotlib() -> None:
    """Raise AdapterError where there is none, before anything has been measured."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise AdapterError("--plot needs matplotlib (the extra `bench`)") from error


def bars(path: Path, table: str, rows: Sequence[Record]) -> None:
    """A group of bars for every model, a bar for every arm."""
    every = _VALUES[table]
    present = (each for each in every if any(_value(row, each[1]) is not None for row in rows))
    title, keys = next(present, every[0])
    values = {
        (_group(row), row["what"]): _value(row, keys) / (1e9 if table == "memory" else 1)
        for row in rows
        if _value(row, keys) is not None
    }
    groups = list(dict.fromkeys(group for group, _ in values))
    arms = list(dict.fromkeys(arm for _, arm in values))
    figure, axes = _figure(max(6.0, 1.5 + 2.2 * len(groups)))
    width = 0.8 / max(len(arms), 1)
    for place, arm in enumerate(arms):
        heights = [values.get((group, arm), 0.0) for group in groups]
        positions = [index + (place - (len(arms) - 1) / 2) * width for index in range(len(groups))]
        drawn = axes.bar(positions, heights, width, label=arm)
        axes.bar_label(drawn, fmt="%.3g", fontsize=7)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(title)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)


def roofline(path: Path, rows: Sequence[Record], peaks: Record) -> None:
    """GFLOP/s over FLOPs a byte of every timed provider, under what the machine can do."""
    figure, axes = _figure(8)
    timed = [row for row in rows if "gflops" in row]
    for provider in dict.fromkeys(row["provider"] for row in timed):
        points = [row for row in timed if row["provider"] == provider]
        axes.scatter(
            [row["intensity"] for row in points], [row["gflops"] for row in points],
            s=18, label=provider,
        )  # fmt: skip
    intensities = [row["intensity"] for row in timed]
    ridge = peaks["gflops"] / peaks["gbs"]
    line = sorted([min(intensities) / 2, ridge, max(intensities) * 2])
    axes.plot(line, [min(peaks["gflops"], x * peaks["gbs"]) for x in line], color="black")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs a byte that must move")
    axes.set_ylabel("GFLOP/s")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def accuracies(path: Path, rows: Sequence[Record]) -> None:
    """A panel for every data set: the accuracy of each arm with its interval."""
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    figure, panels = _figure(2.5 + 4.0 * len(names), panels=len(names))
    for axes, name in zip(panels, names, strict=True):
        arms = [row for row in rows if row["dataset"] == name][::-1]
        values = [100 * row["accuracy"]["value"] for row in arms]
        ends = [[100 * (row["accuracy"][end] or row["accuracy"]["value"]) for row in arms]
                for end in ("low", "high")]  # fmt: skip
        below = [value - low for value, low in zip(values, ends[0], strict=True)]
        above = [high - value for value, high in zip(values, ends[1], strict=True)]
        axes.errorbar(values, range(len(arms)), xerr=[below, above], fmt="o", capsize=3)
        axes.set_yticks(range(len(arms)), [row["what"] for row in arms], fontsize=8)
        axes.set_xlabel(f"{name}: accuracy, %")
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)


def _figure(width: float, panels: int | None = None):
    from matplotlib.figure import Figure  # no pyplot: no display, nothing global

    figure = Figure((width, 4.5), layout="constrained")
    if panels is None:
        return figure, figure.subplots()
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _group(row: Record) -> str:
    return f"{row['model']}\n{row['tokens']:,} tokens"


def _value(row: Record, keys: tuple[str, ...]) -> float | None:
    value: Any = row
    for key in keys:
        value = value.get(key) if value else None
    return value
