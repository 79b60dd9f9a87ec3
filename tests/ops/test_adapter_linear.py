"""`adapter_linear` on every path, folded and plain, against its meaning."""

import pytest
import torch

from tests import kit
from tests.kit import SIZES, Sizes
from tests.ops.operations import ADAPTER, DOUBLE, HALF, Path, away_from_the_bend, follow_reference


@pytest.mark.parametrize("sizes", kit.HARD_SHAPES)
@pytest.mark.parametrize("path", ADAPTER.paths())
def test_hard_shapes(path, sizes):
    follow_reference(ADAPTER, path, ADAPTER.operands(sizes, path.dtype))


@pytest.mark.parametrize("activation", kit.ACTIVATIONS)
@pytest.mark.parametrize("path", ADAPTER.paths())
def test_activations(path, activation):
    tensors = away_from_the_bend(ADAPTER.operands(SIZES, path.dtype), activation)
    follow_reference(ADAPTER, path, tensors, activation=activation)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(SIZES, id="even-width"),
        pytest.param(Sizes(65, 33, 40, 7), id="odd-width"),  # a row may start in mid-hash
        pytest.param(Sizes(20, 40, 64, 70), id="width-above-64"),  # dY is read twice
    ],
)
@pytest.mark.parametrize("path", ADAPTER.paths())
def test_dropout(path, sizes):
    tensors = ADAPTER.operands(sizes, path.dtype)
    follow_reference(ADAPTER, path, tensors, dropout_p=0.3, seed=7, activation="silu")


@pytest.mark.parametrize(
    "absent",
    [
        ("bias",),
        ("bias_down",),
        ("bias_up",),
        ("bias", "bias_down"),
        ("bias", "bias_down", "bias_up"),
    ],
    ids="+".join,
)
@pytest.mark.parametrize("path", ADAPTER.paths())
def test_absent_biases(path, absent):
    tensors = ADAPTER.operands(SIZES, path.dtype, without=(*absent, "scale"))
    follow_reference(ADAPTER, path, tensors, scale=-2.5)


@pytest.mark.parametrize("path", ADAPTER.paths())
def test_base_alone(path):
    tensors = ADAPTER.operands(SIZES, path.dtype, without=("bias_up",))
    follow_reference(ADAPTER, path, tensors | {"up": torch.zeros_like(tensors["up"])})


@pytest.mark.parametrize("path", ADAPTER.paths())
def test_branch_alone(path):
    """The branch reads the base's output, so it cannot be had without: it drowns it instead."""
    tensors = ADAPTER.operands(SIZES, path.dtype, without=("scale",))
    follow_reference(ADAPTER, path, tensors, scale=64.0)


@pytest.mark.parametrize("layout", kit.LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("path", ADAPTER.paths())
def test_any_layout(path, layout):
    tensors = ADAPTER.operands(Sizes(33, 34, 36, 5), path.dtype)
    hostile = {name: layout(tensors[name]) for name in ("x", "weight", "down", "up")}
    follow_reference(ADAPTER, path, tensors | hostile)


@pytest.mark.parametrize("path", ADAPTER.paths(HALF))
def test_sums_that_leave_fp16(path):
    """Folded, dD goes by way of dzᵀ x, a sum over rows: larger than dD where weights are small."""
    tensors = ADAPTER.operands(SIZES, HALF)
    large = {"x": tensors["x"] * 2000, "weight": tensors["weight"] / 1000}
    follow_reference(ADAPTER, path, tensors | large, activation="identity")


def test_folded_equals_plain_in_fp64():
    """Folding is algebra, not approximation."""
    tensors = ADAPTER.operands(SIZES, DOUBLE)
    dy = torch.randn(SIZES.m, SIZES.n, dtype=DOUBLE)
    folded, plain = (
        kit.outcome(
            ADAPTER.along(Path("eager", strategy, DOUBLE)), tensors, ADAPTER.trained, dy,
            dropout_p=0.2, seed=3,
        )
        for strategy in ("folded", "plain")
    )  # fmt: skip
    for name in plain:
        torch.testing.assert_close(folded[name], plain[name], rtol=1e-12, atol=1e-12)
