"""Pictures of importance and of ranks: layers by modules, as heat maps. Needs matplotlib."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .errors import AdapterError
from .paths import layer_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .allocation import RankAllocation


def plot_importance(scores: Mapping[str, float], path: str | os.PathLike) -> None:
    """Draw scores {module path: score} into an image file, in the format of its ending."""
    if not scores:
        raise AdapterError("scores: got none, allowed: at least one module's")
    _draw([("importance", scores, "{:.3f}")], path)


def plot_allocation(report: "RankAllocation", path: str | os.PathLike) -> None:
    """Draw an allocation's scores, its LoRA ranks and its widths into an image file."""
    panels = [("importance", {m.path: m.score for m in report.modules}, "{:.3f}")]
    for title, kinds in (("LoRA rank", ("lora",)), ("bottleneck width", ("bottleneck", "block"))):
        sizes = {m.path: m.after for m in report.modules if m.kind in kinds}
        if sizes:
            panels.append((title, sizes, "{:.0f}"))
    _draw(panels, path)


def grid(
    values: Mapping[str, float],
) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Arrange values by layer and module: rows' names, columns' names, cells (None: no module)."""
    cells = {_place(path): value for path, value in values.items()}
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    return rows, columns, [[cells.get((row, column)) for column in columns] for row in rows]


def _place(path: str) -> tuple[str, str]:
    """Row and column: everything up to the layer's number, and the rest of the path."""
    layer = layer_of(path)
    return layer, path.removeprefix(layer).removeprefix(".")


def _draw(panels: list[tuple[str, Mapping[str, float], str]], path: str | os.PathLike) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise AdapterError("pictures need matplotlib: pip install matplotlib") from None
    grids = [grid(values) for _, values, _ in panels]
    height = max(len(rows) for rows, _, _ in grids)
    widths = [len(columns) for _, columns, _ in grids]
    # A Figure of its own, without pyplot: no display, no state that outlives the call.
    figure = Figure(figsize=(2.5 * len(panels) + 0.8 * sum(widths), 2.2 + 0.35 * height))
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for axis, (title, _, form), (rows, columns, cells) in zip(axes, panels, grids, strict=True):
        _heat_map(axis, title, form, rows, columns, cells)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def _heat_map(
    axis: "Axes",
    title: str,
    form: str,
    rows: list[str],
    columns: list[str],
    cells: list[list[float | None]],
) -> None:
    """One panel: a coloured cell with its value for each module."""
    filled = [[float("nan") if cell is None else cell for cell in row] for row in cells]
    image = axis.imshow(filled, aspect="auto", cmap="viridis")
    axis.set_title(title)
    axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
    axis.set_yticks(range(len(rows)), rows)
    middle = (image.norm.vmin + image.norm.vmax) / 2
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            if cell is not None:
                color = "black" if cell > middle else "white"
                axis.text(x, y, form.format(cell), ha="center", va="center", color=color, size=7)
