"""Draw the pictures of the documents from `bench/results`; needs matplotlib.

python -m bench.pictures    # docs/pictures/training.svg and {ranks,sharing,equal_loss}.png
"""

import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

from artemis import ModuleAllocation, RankAllocation
from artemis.benchmark.arms import ARMS
from artemis.benchmark.records import read

from . import ROOT, equal_loss_tables, headline
from .adapters_tables import Record, cells
from .command_tables import rows_here
from .equal_loss import BASELINE

RESULTS = ROOT / "bench" / "results"
PICTURES = ROOT / "docs" / "pictures"
LORA = ("q_proj", "k_proj", "v_proj", "o_proj")


def main() -> int:
    found = cells(read(RESULTS / "adapters_study.jsonl"))
    PICTURES.mkdir(exist_ok=True)
    draw_ranks(found["ranks by importance within kinds"][0])
    draw_sharing(found)
    draw_equal_loss(read(RESULTS / "equal_loss.jsonl"), PICTURES / "equal_loss.png")
    trained = rows_here("train", read(RESULTS / "cpu_bench_train.jsonl"))
    headline.draw(headline.bars(trained), PICTURES / "training.svg")
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


def draw_equal_loss(records: list[Record], path: Path) -> None:
    """Held-out loss over FLOPs and over device-seconds, of those of full fine-tuning's runs."""
    known, step = equal_loss_tables.curves(records), equal_loss_tables.costs(records)
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, name, title in zip(panels, ("flops", "ms"), ("FLOPs", "device-seconds"), strict=True):
        whole = next(iter(known[BASELINE].values()))[-1][0] * getattr(step[BASELINE], name)
        for number, (arm, runs) in enumerate(known.items()):
            unit = getattr(step[arm], name) / whole
            for seed, curve in runs.items():
                label = ARMS[arm].what if seed == min(runs) else None
                x = [100 * steps * unit for steps, _ in curve]
                axis.plot(x, [loss for _, loss in curve], color=f"C{number}", lw=1, label=label)
        axis.set_xlabel(f"{title}, % of full fine-tuning's run")
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("held-out loss, nats a byte")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
