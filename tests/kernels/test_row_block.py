"""The bottleneck on a block of rows, forward and backward, against fp64 sums."""

import pytest
import torch

from artemis_kernels.ops.bottleneck_adapter.kernels import row_block
from artemis_kernels.ops.low_rank.arguments import NO_DROPOUT, Scale
from tests import kit
from tests.kernels.truth import TINY, assert_close, dropout, rounded, units, units_gradient

pytestmark = pytest.mark.usefixtures("guarded_allocations")

SHAPES = [(35, 50, 20), (32, 48, 16), (3, 5, 1), (5, 40, 300)]  # m, hidden, width
SCALE = Scale(0.5, torch.tensor(3.0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by", [NO_DROPOUT, dropout()], ids=["all", "dropout"])
@pytest.mark.parametrize("biases", [False, True])
def test_forward(shape, by, biases):
    m, k, r = shape
    x, down, up, residual = (torch.randn(*s) for s in ((m, k), (r, k), (k, r), (k, m)))
    bias, bias_out = torch.randn(r), torch.randn(k)
    more = {"bias": bias, "bias_out": bias_out} if biases else {}
    y, z, h = row_block(
        x, down, up, residual.t(), config=TINY, stage="forward", activation="relu", scale=SCALE,
        dropout=by, **more,
    )  # fmt: skip
    exact = x.double() @ down.double().T
    assert_close(z, exact + bias.double() if biases else exact)
    low = units(z, "relu", by) @ up.double().T
    low = low + bias_out.double() if biases else low
    assert_close(y, residual.t().double() + 1.5 * low)
    assert h is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by", [NO_DROPOUT, dropout()], ids=["all", "dropout"])
@pytest.mark.parametrize("residual_is_x", [False, True])
def test_backward(shape, by, residual_is_x):
    m, k, r = shape
    dy, down, up, z = (torch.randn(*s) for s in ((m, k), (r, k), (k, r), (m, r)))
    dx, dz, h = row_block(
        dy, up.t(), down.t(), dy if residual_is_x else None, config=TINY, stage="backward",
        activation="gelu", z=z, scale=SCALE, dropout=by, with_h=True,
    )  # fmt: skip
    exact = units_gradient(dy.double() @ up.double(), z, "gelu", by)
    assert_close(dz, exact)
    assert_close(h, units(z, "gelu", by))
    low = 1.5 * exact @ down.double()
    assert_close(dx, dy.double() + low if residual_is_x else low)


def test_backward_in_16_bits():
    """dz is stored as its product takes it, rounded once."""
    dy, down, up, z = (torch.randn(*s) for s in ((20, 40), (8, 40), (40, 8), (20, 8)))
    dy = dy.half()
    dx, dz, _ = row_block(
        dy, up.t(), down.t(), None, config=TINY, stage="backward", activation="silu", z=z,
        hidden_dtype=torch.float16,
    )  # fmt: skip
    exact = units_gradient(dy.double() @ rounded(up, dy), z, "silu")
    assert dz.dtype == torch.float16
    assert_close(dz, exact, roundings=0.52)
    assert_close(dx, dz.double() @ rounded(down, dy), roundings=0.52)


def test_forward_in_16_bits():
    """The hidden tile is rounded for its product, y once at the end."""
    x, down, up = torch.randn(20, 40).half(), torch.randn(8, 40) / 7, torch.randn(40, 8)
    y, z, _ = row_block(x, down, up, x, config=TINY, stage="forward", activation="silu")
    assert z.dtype == torch.float32
    assert_close(z, x.double() @ rounded(down, x).T)
    h = rounded(units(z, "silu").float(), x)
    assert_close(y, x.double() + h @ rounded(up, x).T, roundings=0.52)


@pytest.mark.parametrize("layout", kit.LAYOUTS)
def test_any_strides(layout):
    x, down, up = torch.randn(20, 33), torch.randn(10, 33), torch.randn(33, 10)
    more = {"config": TINY, "stage": "forward", "activation": "gelu"}
    laid = row_block(layout(x), layout(down), layout(up), layout(x), **more)
    for mine, wanted in zip(laid[:2], row_block(x, down, up, x, **more)[:2], strict=True):
        kit.assert_same_bits(mine, wanted)


def test_no_rows():
    x = torch.randn(0, 6)
    y, z, h = row_block(
        x, torch.randn(3, 6), torch.randn(6, 3), x, config=TINY, stage="forward",
        activation="gelu", with_h=True,
    )  # fmt: skip
    assert y.shape == (0, 6) and z.shape == h.shape == (0, 3)
