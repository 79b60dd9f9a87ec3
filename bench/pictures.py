"""Draw the pictures of docs/adapters.md from `bench/results`; needs matplotlib.

python -m bench.pictures          # writes docs/pictures/ranks.png and sharing.png
"""

import statistics
import sys

from matplotlib.figure import Figure

from artemis import ModuleAllocation, RankAllocation
from artemis.benchmark.runner import read

from . import ROOT
from .adapters_tables import Record, cells

RESULTS = ROOT / "bench" / "results" / "adapters_study.jsonl"
PICTURES = ROOT / "docs" / "pictures"
LORA = ("q_proj", "k_proj", "v_proj", "o_proj")


def main() -> int:
    found = cells(read(RESULTS))
    PICTURES.mkdir(exist_ok=True)
    draw_ranks(found["ranks by importance within kinds"][0])
    draw_sharing(found)
    return 0


def draw_ranks(run: Record) -> None:
    """Importance, ranks and widths of one run, layers by modules."""
    modules = tuple(
        ModuleAllocation(
            path, "lora" if path.endswith(LORA) else "bottleneck", run["scores"][path],
            before=0, after=size, cost=0, error=0.0,
        )
        for path, size in run["sizes"].items()
    )  # fmt: skip
    RankAllocation(modules, 0, 0, 0, run["parameters"], "").plot(PICTURES / "ranks.png")


def draw_sharing(found: dict[str, list[Record]]) -> None:
    """What every kind of module stores, and how far it brings the loss, shared and not."""
    figure = Figure(figsize=(6, 3.2))
    axis = figure.subplots()
    for shared, own in (
        ("default", "nothing shared"),
        ("LoRA alone, shared", "LoRA alone, not shared"),
        ("bottlenecks alone, shared", "bottlenecks alone, not shared"),
    ):
        if shared not in found or own not in found:
            continue
        stored = [found[arm][0]["parameters"] / 1e3 for arm in (shared, own)]
        loss = [statistics.mean(run["loss"] for run in found[arm]) for arm in (shared, own)]
        name = shared.replace("default", "both").removesuffix(", shared")
        axis.plot(stored, loss, "-", label=name)
        axis.plot(stored[:1], loss[:1], "o", color=axis.lines[-1].get_color())
        axis.plot(stored[1:], loss[1:], "s", color=axis.lines[-2].get_color())
    axis.set_xlabel("stored parameters, thousands (dot: shared, square: not)")
    axis.set_ylabel("held-out loss, nats a byte")
    axis.legend()
    figure.tight_layout()
    figure.savefig(PICTURES / "sharing.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
