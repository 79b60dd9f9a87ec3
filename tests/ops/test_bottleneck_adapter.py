"""`bottleneck_adapter` on every path against its meaning."""

import pytest
import torch

from tests import kit
from tests.kit import SIZES, Sizes
from tests.ops.operations import BOTTLENECK, away_from_the_bend, follow_reference


@pytest.mark.parametrize("sizes", kit.HARD_SHAPES)
@pytest.mark.parametrize("path", BOTTLENECK.paths())
def test_hard_shapes(path, sizes):
    follow_reference(BOTTLENECK, path, BOTTLENECK.operands(sizes, path.dtype))


@pytest.mark.parametrize("path", BOTTLENECK.paths())
def test_residual_is_x(path):
    tensors = BOTTLENECK.operands(SIZES, path.dtype, without=("residual",))
    follow_reference(BOTTLENECK, path, tensors)


@pytest.mark.parametrize("activation", kit.ACTIVATIONS)
@pytest.mark.parametrize("path", BOTTLENECK.paths())
def test_activations(path, activation):
    tensors = away_from_the_bend(BOTTLENECK.operands(SIZES, path.dtype), activation)
    follow_reference(BOTTLENECK, path, tensors, activation=activation)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(SIZES, id="even-width"),
        pytest.param(Sizes(65, 33, 0, 7), id="odd-width"),  # a row may start in mid-hash
        pytest.param(Sizes(20, 64, 0, 300), id="wide"),  # beyond what a row block holds
    ],
)
@pytest.mark.parametrize("path", BOTTLENECK.paths())
def test_dropout(path, sizes):
    if path.strategy == "row_block" and sizes.r > 256:
        pytest.skip("a row block holds 256 units; wider ones always take two launches")
    tensors = BOTTLENECK.operands(sizes, path.dtype)
    follow_reference(BOTTLENECK, path, tensors, dropout_p=0.3, seed=7, activation="silu")


@pytest.mark.parametrize(
    "absent", [("bias_down",), ("bias_up",), ("bias_down", "bias_up")], ids="+".join
)
@pytest.mark.parametrize("path", BOTTLENECK.paths())
def test_absent_biases(path, absent):
    tensors = BOTTLENECK.operands(SIZES, path.dtype, without=(*absent, "scale"))
    follow_reference(BOTTLENECK, path, tensors, scale=-2.5)


@pytest.mark.parametrize("silent", ["residual", "up"])
@pytest.mark.parametrize("path", BOTTLENECK.paths())
def test_each_term_alone(path, silent):
    tensors = BOTTLENECK.operands(SIZES, path.dtype)
    follow_reference(BOTTLENECK, path, tensors | {silent: torch.zeros_like(tensors[silent])})


@pytest.mark.parametrize("layout", kit.LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("path", BOTTLENECK.paths())
def test_any_layout(path, layout):
    tensors = BOTTLENECK.operands(Sizes(33, 34, 0, 5), path.dtype)
    hostile = {name: layout(tensors[name]) for name in ("x", "residual", "down", "up")}
    follow_reference(BOTTLENECK, path, tensors | hostile)
