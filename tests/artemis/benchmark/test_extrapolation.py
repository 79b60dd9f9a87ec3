"""A whole model from its parts: the sum against a cost that is known in full."""

import pytest

from artemis.benchmark.extrapolation import by_layers, described, total
from artemis.benchmark.models import LARGE, Architecture, Cell
from artemis.benchmark.settings import extrapolated
from artemis.benchmark.turns import Spread

SIZES = Architecture(hidden=64, intermediate=96, layers=80, vocabulary=131072)


def cost(cell: Cell) -> float:
    """3 for whatever is there once, 7 a layer, 0.01 a row of the vocabulary."""
    return 3 + 7 * cell.layers + 0.01 * cell.vocabulary


@pytest.mark.parametrize(
    ("largest_layers", "largest_vocabulary", "cells"),
    [
        (2, 131072, {(2, 4096), (1, 4096), (0, 4096), (0, 131072)}),
        (1, 131072, {(1, 4096), (0, 4096), (0, 131072)}),
        (1, 40000, {(1, 4096), (0, 4096), (0, 32768), (0, 16384)}),
    ],
)
def test_the_whole_is_the_sum_of_its_parts(largest_layers, largest_vocabulary, cells):
    def fits(cell: Cell) -> bool:
        return cell.layers <= largest_layers and cell.vocabulary <= largest_vocabulary

    estimate = by_layers("64x80", SIZES, 8, 128, fits)
    assert {(cell.layers, cell.vocabulary) for cell in estimate} == cells
    by_hand = 3 + 7 * 80 + 0.01 * 131072
    assert total(estimate, {cell: cost(cell) for cell in estimate}) == pytest.approx(by_hand)
    assert "extrapolated" in described(estimate)


def test_a_small_vocabulary_is_counted_once():
    sizes = Architecture(64, 96, layers=3, vocabulary=4096)
    estimate = by_layers("64x3", sizes, 1, 16, lambda cell: True)
    assert {(c.layers, c.vocabulary): k for c, k in estimate.items()} == {
        (2, 4096): 2, (1, 4096): -1,
    }  # fmt: skip


def test_a_spread_leaves_out_a_fifth_at_either_end():
    assert Spread.of([float(value) for value in (9, 1, 8, 0, 5, 2, 10, 4, 3, 7, 6)]) == (5, 2, 8)


def test_the_range_of_a_whole_widens_with_its_layers():
    one, two = (Cell("64x10", layers, 4096, 1, 16, whole=False) for layers in (1, 2))
    spreads = {two: Spread(20.0, 19.0, 22.0), one: Spread(10.0, 9.0, 11.0)}
    found = extrapolated({two: 9, one: -8}, spreads)
    assert found == {"p50": 100.0, "p20": 100 - 9 * 1 - 8 * 1, "p80": 100 + 9 * 2 + 8 * 1}


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3.2-1b", 1.2358),
        ("llama-2-7b", 6.738),
        ("llama-2-13b", 13.016),
        ("llama-3-70b", 70.554),
    ],
)
def test_the_named_models_have_their_published_sizes(name, billions):
    """Parameters as their publishers count them; norms are a hundredth of a percent."""
    assert LARGE[name].parameters / 1e9 == pytest.approx(billions, rel=2e-4)
