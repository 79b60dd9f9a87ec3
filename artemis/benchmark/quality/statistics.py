"""Accuracies of several seeds on the same test items: means, intervals, ratios, differences."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy

#: 97.5 % points of Student's distribution for 1 to 30 degrees of freedom.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_NORMAL = 1.960
RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95 % interval; no ends where there is but one seed."""

    value: float
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)


def student(values: Sequence[float]) -> Interval:
    """Mean and Student's interval over seeds."""
    mean, count = float(numpy.mean(values)), len(values)
    if count < 2:
        return Interval(mean, None, None)
    point = _STUDENT[count - 2] if count - 2 < len(_STUDENT) else _NORMAL
    half = point * float(numpy.std(values, ddof=1)) / count**0.5
    return Interval(mean, mean - half, mean + half)


def bootstrap(
    correct: Sequence[numpy.ndarray], statistic: Callable[..., numpy.ndarray]
) -> Interval:
    """`statistic` of arms' accuracies, with the percentile interval of a paired bootstrap.

    Args:
        correct: for each arm whether it was right, bool [seeds, items]: seeds and items in the
            same order in all. Both are drawn anew with replacement, the same for every arm.
        statistic: takes an accuracy an arm, each a number or an array of resamples.
    """
    seeds, items = correct[0].shape
    if any(each.shape != (seeds, items) for each in correct):
        raise ValueError(f"arms of different shapes: {[each.shape for each in correct]}")
    value = float(statistic(*(each.mean() for each in correct)))
    random = numpy.random.default_rng(0)
    seed_weights = random.multinomial(seeds, [1 / seeds] * seeds, RESAMPLES) / seeds
    item_weights = random.multinomial(items, [1 / items] * items, RESAMPLES) / items
    accuracies = [
        numpy.einsum("bs,bs->b", seed_weights, item_weights @ each.T.astype(float))
        for each in correct
    ]
    with numpy.errstate(divide="ignore", invalid="ignore"):  # a resample may have no gap
        low, high = numpy.nanpercentile(statistic(*accuracies), (2.5, 97.5))
    return Interval(value, float(low), float(high))


def difference(arm, other):
    return arm - other


def retention(arm, full):
    """The share of full fine-tuning's accuracy that an arm has."""
    return arm / full


def gap_closed(arm, full, frozen):
    """The share of the way from the frozen base to full fine-tuning that an arm goes."""
    return (arm - frozen) / (full - frozen)
