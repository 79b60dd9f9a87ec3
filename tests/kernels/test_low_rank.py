"""The forward kernels of the low-rank family, one by one, against fp64 sums.

Every test poisons what the launchers allocate and checks guard bands round it; most run in fp32,
where an error of logic cannot hide behind a rounding.
"""

from dataclasses import replace

import pytest
import torch

from artemis_kernels.ops.low_rank.arguments import NO_DROPOUT, Scale
from artemis_kernels.ops.low_rank.expand import expand, update
from artemis_kernels.ops.low_rank.one_pass import one_pass
from artemis_kernels.ops.low_rank.shrink import shrink
from tests import kit
from tests.kernels.truth import (
    TINY,
    TINY_SPLIT,
    assert_close,
    dropout,
    dropped,
    rounded,
    units,
    units_gradient,
)

pytestmark = pytest.mark.usefixtures("guarded_allocations")

# m, k, n, r: ragged tiles everywhere; whole tiles everywhere; less than a tile
SHAPES = [(35, 50, 41, 20), (32, 48, 32, 16), (3, 5, 7, 1)]
SPLITS = pytest.mark.parametrize("config", [TINY, TINY_SPLIT], ids=["whole", "split"])


@SPLITS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by", [NO_DROPOUT, dropout()], ids=["all", "dropout"])
def test_shrink_linear(config, shape, by):
    m, k, _, r = shape
    x, f = torch.randn(m, k), torch.randn(r, k)
    out, h = shrink(x, f, config=config, dropout=by)
    assert_close(out, dropped(x, by) @ f.double().T)
    assert h is None


@SPLITS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by", [NO_DROPOUT, dropout()], ids=["all", "dropout"])
def test_shrink_forward_stage(config, shape, by):
    m, k, _, r = shape
    x, f, bias = torch.randn(m, k).half(), torch.randn(r, k) / k**0.5, torch.randn(r)
    z, h = shrink(
        x, f, config=config, stage="forward", bias=bias, activation="gelu", dropout=by, with_h=True
    )
    assert_close(z, x.double() @ rounded(f, x).T + bias.double())
    assert h.dtype == x.dtype
    assert_close(h, units(z, "gelu", by))


@SPLITS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_h", [False, True])
def test_shrink_backward_stage(config, shape, with_h):
    m, k, _, r = shape
    dy, up, z = torch.randn(m, k), torch.randn(k, r), torch.randn(m, r)
    dz, h = shrink(
        dy, up.t(), config=config, stage="backward", z=z, activation="silu", dropout=dropout(),
        with_h=with_h,
    )  # fmt: skip
    assert_close(dz, units_gradient(dy.double() @ up.double(), z, "silu", dropout()))
    if with_h:
        assert_close(h, units(z, "silu", dropout()))
    else:
        assert h is None


def test_shrink_splits_more_than_there_are_steps():
    """A part without a step must add zero, not what its memory held."""
    x, f = torch.randn(5, 20), torch.randn(4, 20)
    out, _ = shrink(x, f, config=replace(TINY, split=8))
    assert_close(out, x.double() @ f.double().T)


def test_shrink_does_not_depend_on_stacking():
    """F's of several layers may share one read: each gets what it would get alone, bit for bit."""
    x, f, g = torch.randn(20, 40), torch.randn(16, 40), torch.randn(16, 40)
    both, _ = shrink(x, torch.cat((f, g)), config=TINY)
    kit.assert_same_bits(both[:, :16], shrink(x, f, config=TINY)[0])
    kit.assert_same_bits(both[:, 16:], shrink(x, g, config=TINY)[0])


def operands(shape, dtype=torch.float32):
    m, k, n, r = shape
    return (
        torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(m, r),
        torch.randn(n, r), torch.randn(n).to(dtype), torch.randn(n),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [*SHAPES, (20, 40, 33, 50)], ids=str)
@pytest.mark.parametrize("by", [NO_DROPOUT, dropout()], ids=["all", "dropout"])
@pytest.mark.parametrize("biases", [False, True])
def test_expand(shape, by, biases):
    x, weight, s, b, bias, bias_low = operands(shape)
    scale = Scale(0.5, torch.tensor(-1.5))
    more = {"bias": bias, "bias_low": bias_low} if biases else {}
    y = expand(x, weight, s, b, config=TINY, scale=scale, dropout=by, **more)
    exact = x.double() @ weight.double().T - 0.75 * dropped(s.double() @ b.double().T, by)
    if biases:
        exact = exact + bias.double() - 0.75 * bias_low.double()
    assert_close(y, exact)


def test_expand_rounds_once():
    """In 16 bits y is the rounded exact sum: half a unit in the last place, not more."""
    x, weight, s, b, bias, _ = operands((20, 40, 33, 10), torch.float16)
    y = expand(x, weight, s, b, config=TINY, bias=bias, scale=Scale(0.37))
    exact = x.double() @ weight.double().T + 0.37 * rounded(s, x) @ rounded(b, x).T + bias.double()
    assert_close(y, exact, roundings=0.52)


@pytest.mark.parametrize("shape", [*SHAPES, (20, 40, 33, 50)], ids=str)
@pytest.mark.parametrize("by", [NO_DROPOUT, dropout()], ids=["all", "dropout"])
@pytest.mark.parametrize("start", ["none", "residual", "in place"])
def test_update(shape, by, start):
    m, _, n, _ = shape
    _, _, s, b, _, bias_low = operands(shape)
    residual = None if start == "none" else torch.randn(n, m).t()
    exact = 2 * (dropped(s.double() @ b.double().T, by) + bias_low.double())
    exact = exact if residual is None else exact + residual.double()
    residual = residual.contiguous() if start == "in place" else residual
    y = update(
        residual, s, b, config=TINY, dtype=torch.float32, bias_low=bias_low, scale=Scale(2.0),
        dropout=by, out=residual if start == "in place" else None,
    )  # fmt: skip
    assert_close(y, exact)
    assert (y is residual) == (start == "in place")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_one_pass(shape, with_bias):
    m, k, n, r = shape
    x, weight, _, b, bias, _ = operands(shape)
    a = torch.randn(r, k)
    y, s = one_pass(
        x, weight, a, b, config=TINY, bias=bias if with_bias else None,
        scale=Scale(0.5, torch.tensor(3.0)),
    )  # fmt: skip
    exact_s = x.double() @ a.double().T
    exact = x.double() @ weight.double().T + 1.5 * exact_s @ b.double().T
    assert_close(s, exact_s)
    assert_close(y, exact + bias.double() if with_bias else exact)


@pytest.mark.parametrize("layout", kit.LAYOUTS)
def test_any_strides(layout):
    """Only what the launchers allocate themselves is contiguous by right."""
    x, weight, s, b, bias, bias_low = operands((20, 40, 33, 10))
    a = torch.randn(10, 40)
    laid = [layout(t) for t in (x, weight, a, b)]
    row = kit.sliced(bias[None])[0]
    more = {"config": TINY, "scale": Scale(2.0)}
    kit.assert_same_bits(
        expand(laid[0], laid[1], s, laid[3], bias=row, bias_low=bias_low, **more),
        expand(x, weight, s, b, bias=bias, bias_low=bias_low, **more),
    )
    kit.assert_same_bits(
        shrink(laid[0], laid[2], config=TINY, dropout=dropout())[0],
        shrink(x, a, config=TINY, dropout=dropout())[0],
    )
    for mine, plain in zip(one_pass(*laid, **more), one_pass(x, weight, a, b, **more), strict=True):
        kit.assert_same_bits(mine, plain)


def test_no_rows():
    x, weight, s, b, _, _ = operands((0, 8, 6, 3))
    assert shrink(x, torch.randn(3, 8), config=TINY)[0].shape == (0, 3)
    assert expand(x, weight, s, b, config=TINY).shape == (0, 6)
    assert update(None, s, b, config=TINY, dtype=x.dtype).shape == (0, 6)
    y, s = one_pass(x, weight, torch.randn(3, 8), b, config=TINY)
    assert y.shape == (0, 6) and s.shape == (0, 3)
