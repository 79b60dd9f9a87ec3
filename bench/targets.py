"""The ratios that a training-step run is judged by, and what each must reach."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from artemis.benchmark.turns import Spread


class Ratio(NamedTuple):
    """`time of the slower arms / time of the faster ones`, round by round; arms of a side add up.

    A target is `at_least` or `at_most`, or there is none and the ratio is for the reader.
    """

    name: str
    above: tuple[str, ...]
    below: tuple[str, ...]
    at_least: float | None = None
    at_most: float | None = None

    def measured(self, times: Mapping[str, list[float]]) -> Spread | None:
        """Median and spread over rounds, or None where an arm did not run."""
        if not all(arm in times for arm in (*self.above, *self.below)):
            return None
        sums = (
            map(sum, zip(*(times[arm] for arm in side), strict=True))
            for side in (self.above, self.below)
        )
        return Spread.of([above / below for above, below in zip(*sums, strict=True)])

    def met(self, value: float) -> bool | None:
        """Whether a value reaches the target; None where there is no target."""
        if self.at_least is not None:
            return value >= self.at_least
        if self.at_most is not None:
            return value <= self.at_most
        return None

    @property
    def target(self) -> str:
        """The target in words."""
        if self.at_least is not None:
            return f"≥ {self.at_least}"
        return "" if self.at_most is None else f"≤ {self.at_most}"

    def record(self, spread: Spread) -> dict[str, Any]:
        """Plain values for a JSON line."""
        return {
            "kind": "ratio",
            "name": self.name,
            **spread.to_dict(),
            "target": self.target,
            "met": self.met(spread.p50),
        }


def _of(precision: str, full: str, hybrid: float | None, lora_dropout: float) -> list[Ratio]:
    """The ratios of one precision; `full` is its full fine-tuning."""

    def arms(*names: str) -> tuple[str, ...]:
        return tuple(f"{precision}/{name}" for name in names)

    whole, own_floor = arms(full), arms("floor", "products")
    against = f"speed against {full}"
    ceiling = 1.12 if precision == "fp32" else None
    ratios = (
        Ratio(f"default hybrid, {against}", whole, arms("hybrid"), hybrid),
        Ratio("default hybrid, time over its own floor", arms("hybrid"), own_floor, None, ceiling),
        Ratio(
            "LoRA, dropout 0.1, speed against PEFT",
            arms("peft-dropout"),
            arms("lora-dropout"),
            lora_dropout,
        ),
        Ratio("LoRA, no dropout, speed against PEFT", arms("peft"), arms("lora"), 1.0),
        Ratio(f"hybrid, nothing shared, {against}", whole, arms("hybrid-unshared")),
        Ratio(f"Artemis LoRA, {against}", whole, arms("lora")),
        Ratio(f"PEFT LoRA, {against}", whole, arms("peft")),
        Ratio(f"frozen floor, {against}", whole, arms("floor")),
        Ratio(f"hybrid's own floor, {against}", whole, own_floor),
    )
    return [ratio._replace(name=f"{precision}: {ratio.name}") for ratio in ratios]


RATIOS = [
    *_of("fp32", "full", hybrid=1.12, lora_dropout=1.35),
    *_of("bf16", "full-autocast", hybrid=1.15, lora_dropout=1.3),
    Ratio("bf16: default hybrid, speed against full in bf16", ("bf16/full",), ("bf16/hybrid",)),
]
