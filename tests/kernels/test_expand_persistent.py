"""The persistent GEMM with tensor descriptors, against fp64 sums."""

from unittest import mock

import pytest
import torch

from artemis_kernels.core import tuning
from artemis_kernels.core.device import CHIPS, INTERPRETER
from artemis_kernels.core.tiling import Shape
from artemis_kernels.ops.low_rank import steps
from artemis_kernels.ops.low_rank.arguments import NO_DROPOUT, Scale
from artemis_kernels.ops.low_rank.expand_persistent import expand_persistent, has_descriptors
from tests.kernels.truth import TINY, assert_close, dropout, dropped

pytestmark = pytest.mark.usefixtures("guarded_allocations")

# m, k, n, r: ragged tiles everywhere; whole tiles everywhere; less than a tile
SHAPES = [(35, 52, 44, 20), (64, 48, 64, 16), (3, 4, 8, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("by", [NO_DROPOUT, dropout()], ids=["all", "dropout"])
def test_expand_persistent(shape, transposed, by):
    """Two programs for up to four tiles: a program takes several."""
    m, k, n, r = shape
    x, s, b = torch.randn(m, k), torch.randn(m, r), torch.randn(n, r)
    weight = torch.randn(k, n).t() if transposed else torch.randn(n, k)
    bias, bias_low, scale = torch.randn(n), torch.randn(n), Scale(0.5, torch.tensor(1.5))
    assert has_descriptors(x, weight)
    y = expand_persistent(
        x, weight, s, b, config=TINY, programs=2, bias=bias, bias_low=bias_low, scale=scale,
        dropout=by,
    )  # fmt: skip
    low = dropped(s.double() @ b.double().T, by) + bias_low.double()
    assert_close(y, x.double() @ weight.double().T + bias.double() + 0.75 * low)


@pytest.mark.parametrize("masked", [False, True])
def test_a_mask_is_drawn_behind_the_vendors_product(masked):
    """On the chip where it was measured; without one the term is in the product."""
    m, k, n, r = 70, 32, 48, 16
    x, weight, s, b = (torch.randn(shape) for shape in ((m, k), (n, k), (m, r), (n, r)))
    by = dropout() if masked else NO_DROPOUT
    with mock.patch.object(steps, "expand", wraps=steps.expand) as fused:
        y = steps.expanded(x, weight, s, b, CHIPS["sm_90"], vendor=False, dropout=by)
    assert fused.called == (not masked)  # fp32: by pointers
    assert_close(y, x.double() @ weight.double().T + dropped(s.double() @ b.double().T, by))
    shape = Shape(m, n, k, r, masked=masked)
    assert tuning.draws_apart(shape, CHIPS["sm_90"]) == masked
    assert not tuning.draws_apart(shape, CHIPS["sm_80"])


def test_no_descriptors_without_alignment():
    x, weight = torch.randn(8, 16), torch.randn(8, 16)
    assert has_descriptors(x, weight) and has_descriptors(x, torch.randn(16, 8).t())
    assert not has_descriptors(torch.randn(8, 17)[:, 1:], weight)  # address
    assert not has_descriptors(torch.randn(8, 18)[:, :16], weight)  # stride
    assert not has_descriptors(torch.randn(16, 8).t(), weight)  # columns of stride 1
    assert not has_descriptors(x, torch.randn(6, 16))  # rows of y
    assert not has_descriptors(x[:1].expand(8, 16), weight)  # stride 0


@pytest.mark.parametrize("k", [32, 33])
def test_taken_where_the_operands_can_be_described(k):
    x, weight, s, b = (torch.randn(40, n) for n in (k, k, 16, 16))
    with (
        mock.patch.object(tuning, "multiplies_by_descriptors", return_value=True),
        mock.patch.object(steps, "expand_persistent", wraps=expand_persistent) as persistent,
    ):
        y = steps.expanded(x, weight, s, b, CHIPS[INTERPRETER], vendor=False)
    assert persistent.called == (k == 32)
    assert_close(y, x.double() @ weight.double().T + s.double() @ b.double().T)


def test_chosen_only_where_it_has_been_measured():
    shape = Shape(4096, 4096, 4096, 16)
    assert tuning.multiplies_by_descriptors(shape, CHIPS["sm_90"])
    for other in ("sm_80", "sm_100", "gfx942"):
        assert not tuning.multiplies_by_descriptors(shape, CHIPS[other])
    for changed in ({"m": 16}, {"dtype": torch.float32}, {"masked": True}):
        unsuited = shape._replace(**changed)
        assert not tuning.multiplies_by_descriptors(unsuited, CHIPS["sm_90"])
