"""A whole model's cost from parts that fit: a sum of measured cells, each times a coefficient.

Layers of a model are alike, so a cost is `head(vocabulary) + layers · layer`. `layer` is the
difference between two and one layers (one and none where two do not fit), `head`, the embeddings
and all that is not a layer, that of no layers at the full vocabulary, or, where even that does not
fit, the straight line through two smaller vocabularies.
"""

from collections import Counter
from collections.abc import Callable, Mapping

from .models import Architecture, Cell

SMALL_VOCABULARY = 4096  # of the cells that layers are measured in
Estimate = dict[Cell, float]  # cell -> coefficient


def whole(cell: Cell) -> Estimate:
    """The model itself."""
    return {cell: 1.0}


def by_layers(
    model: str, sizes: Architecture, batch: int, sequence: int, fits: Callable[[Cell], bool]
) -> Estimate:
    """The whole of `sizes` from cells of few layers, as many and as wide as `fits` allows."""

    def cell(layers: int, vocabulary: int) -> Cell:
        return Cell(model, layers, vocabulary, batch, sequence, whole=False)

    small = min(SMALL_VOCABULARY, sizes.vocabulary)
    terms: Counter[Cell] = Counter()
    if fits(cell(2, small)):
        layers = {2: sizes.layers - 1, 1: 2 - sizes.layers, 0: -1}
    else:
        layers = {1: sizes.layers, 0: -sizes.layers}
    for count, coefficient in layers.items():
        terms[cell(count, small)] += coefficient
    for vocabulary, coefficient in _vocabularies(sizes.vocabulary, small, fits, cell).items():
        terms[cell(0, vocabulary)] += coefficient
    return {each: coefficient for each, coefficient in terms.items() if coefficient}


def _vocabularies(
    vocabulary: int, small: int, fits: Callable[[Cell], bool], cell: Callable[[int, int], Cell]
) -> dict[int, float]:
    """Coefficients of the vocabularies that a head of `vocabulary` rows is worked out from."""
    largest = vocabulary
    while not fits(cell(0, largest)) and largest >= 4 * small:
        largest //= 2
    if largest == vocabulary:
        return {vocabulary: 1.0}
    beyond = (vocabulary - largest) / (largest - largest // 2)
    return {largest: 1 + beyond, largest // 2: -beyond}


def total(estimate: Estimate, values: Mapping[Cell, float]) -> float:
    """The whole's value of anything that adds up: milliseconds, bytes, operations."""
    return sum(coefficient * values[cell] for cell, coefficient in estimate.items())


def described(estimate: Estimate) -> str:
    """What was measured, in words."""
    cells = list(estimate)
    if cells[0].whole:
        return "measured whole"
    layers = sorted({cell.layers for cell in cells if cell.layers})
    counted = " and ".join(map(str, [0, 1] if layers == [1] else layers))
    _, *larger = sorted({cell.vocabulary for cell in cells})
    heads = "embeddings and head once"
    if len(larger) == 2:
        heads = f"embeddings and head from {larger[0]:,} and {larger[1]:,} rows"
    return f"extrapolated from {counted} true-width layers, {heads}"
