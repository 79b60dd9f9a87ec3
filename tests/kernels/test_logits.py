"""The gradient of logits rounded to int8, and its peaks in the epilogue of a product.

Tiles are smaller than the rows; allocations are poisoned, the bands round them checked.
"""

from dataclasses import replace

import pytest
import torch

from artemis_kernels.core.eight_bit_rows import Peaks
from artemis_kernels.core.tiling import Config
from artemis_kernels.ops.packed.eight_bit import eight_bit
from artemis_kernels.ops.packed.epilogue import finish
from artemis_kernels.ops.packed.round_logits import round_logits
from tests import kit
from tests.kernels.packed import TINY, added, terms
from tests.kernels.truth import assert_close, dropout
from tests.kit import logits_gradient

pytestmark = pytest.mark.usefixtures("guarded_allocations")

STEPS = Config(0, block_k=32, warps=1, stages=1)
SHAPES = [(1, 1), (3, 2), (5, 31), (4, 32), (7, 33), (9, 700)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "k"), SHAPES, ids=str)
def test_no_sum_is_lost(m, k, dtype):
    """A peak exact, the rest within one step, and every sum from a row's start within half."""
    dy, factor = logits_gradient(m, k, 3.0, dtype), torch.rand(k) + 0.5
    q, scale, apart, columns, (peak, at) = round_logits(dy, factor, config=STEPS)
    assert apart is None and columns is None and q.dtype == torch.int8 and q.is_contiguous()
    v = dy.double() * factor.double()
    torch.testing.assert_close(peak.double().abs(), v.abs().amax(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(peak.double(), v.gather(1, at[:, None])[:, 0], rtol=1e-6, atol=0)
    v.scatter_(1, at[:, None], 0.0)
    torch.testing.assert_close(scale.double(), v.abs().amax(1) / 126, rtol=1e-6, atol=0)
    step = scale.double()[:, None]
    wrong = q * step - v
    assert (wrong.abs() <= 1.001 * step).all()
    assert (wrong.cumsum(1).abs() <= 0.501 * step).all()
    assert (q.gather(1, at[:, None]).abs() <= 1).all()


def test_tiles_change_no_bit():
    dy, factor = logits_gradient(5, 700, 2.0), torch.rand(700) + 0.5
    small, large = (
        round_logits(dy, factor, config=replace(STEPS, block_k=size)) for size in (16, 1024)
    )
    kit.assert_same_bits(small.q, large.q)
    kit.assert_same_bits(small.scale, large.scale)


def test_numbers_far_below_a_step_count_together():
    """A peak, a second number and 1,998 at 1/1,000 of a step: two of those become a 1."""
    dy = torch.full((2, 2000), 1 / 126_000)
    dy[0, [3, 1700]], dy[1, [1999, 0]] = torch.tensor([-9.0, 1.0]), torch.tensor([2.0, -1.0])
    rounded = round_logits(dy, torch.ones(2000), config=replace(STEPS, block_k=512))
    assert rounded.peaks.at.tolist() == [3, 1999] and rounded.peaks.value.tolist() == [-9.0, 2.0]
    assert rounded.q.sum(1).tolist() == [128, -124]
    assert rounded.q.max(1).values.tolist() == [126, 1] and rounded.q[1, 0] == -126


def test_equal_numbers_of_full_size():
    """Their fixed-point sums pass 32 bits; the first of them is the peak."""
    rounded = round_logits(torch.ones(2, 300), torch.ones(300), config=STEPS)
    assert rounded.peaks.at.tolist() == [0, 0]
    assert (rounded.q[:, 0] == 0).all() and (rounded.q[:, 1:] == 126).all()


def test_rows_that_are_not_numbers_and_rows_of_nothing():
    dy = torch.randn(7, 70)
    dy[0], dy[1] = 0, 1e-38
    dy[2], dy[2, 50] = 0, 1.0  # a peak and nothing else
    dy[3, 5], dy[4, 66] = torch.nan, -torch.inf
    dy[5, 3], dy[5, 40] = torch.inf, torch.inf
    rounded = round_logits(dy, torch.ones(70), config=STEPS)
    assert rounded.scale.isnan().tolist() == [False, False, False, True, True, True, False]
    assert (rounded.scale[:3] == 0).all() and (rounded.q[:6] == 0).all()
    assert rounded.peaks.value[[0, 2, 3, 4, 5]].tolist() == [0, 1, 0, 0, 0]
    assert rounded.peaks.at[2] == 50 and ((rounded.peaks.at >= 0) & (rounded.peaks.at < 70)).all()


@pytest.mark.parametrize("layout", [*kit.LAYOUTS, lambda t: t[:1].expand(6, -1)])
def test_rows_of_any_strides(layout):
    dy, factor = logits_gradient(6, 100, 2.0), torch.rand(100) + 0.5
    mine = round_logits(layout(dy), factor, config=STEPS)
    wanted = round_logits(layout(dy).contiguous(), factor, config=STEPS)
    for one, other in zip((*mine[:2], *mine.peaks), (*wanted[:2], *wanted.peaks), strict=True):
        kit.assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("vendor", [False, True], ids=["one kernel", "finish"])
@pytest.mark.parametrize("transposed", [False, True])
def test_peaks_meet_their_lines_in_the_epilogue(dtype, vendor, transposed):
    """With a low-rank term under a mask, and added to what is there."""
    m, n, k = 20, 41, 70
    q, data = (torch.randint(-127, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    lines = data.t() if transposed else data.t().contiguous()
    peaks, row = Peaks(torch.randn(m), torch.randint(0, k, (m,))), torch.rand(m) / 1000
    epilogue = terms(m, n, 5, dropout())._replace(row=row, peaks=peaks, lines=lines)
    y = torch.randn(m, n).to(dtype)
    products = q.double() @ data.double().t()
    exact = products * row[:, None] + peaks.value.double()[:, None] * lines.double()[peaks.at]
    exact += added(epilogue, dtype) + y.double()
    epilogue = epilogue._replace(residual=y)
    if vendor:
        finish(products.to(torch.int32)[None], y, epilogue, config=TINY)
    else:
        eight_bit(q, data, y, epilogue, config=TINY)
    assert_close(y, exact, roundings=0.55)
