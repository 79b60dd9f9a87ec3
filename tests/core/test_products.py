"""Thin products: whatever orientation is computed, the value is the plain one's."""

import pytest
import torch

from artemis_kernels.core import native, products
from tests import kit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 16, 17, 40])  # 16 is where the orientation changes
def test_equal_plain_products(rank, dtype):
    x, f = torch.randn(9, 21).to(dtype), torch.randn(rank, 21).to(dtype)
    left, right = torch.randn(9, 20).to(dtype), torch.randn(9, rank).to(dtype)
    close = {"rtol": 1e-2, "atol": 1e-1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(products.project(x, f), x @ f.T, **close)
    torch.testing.assert_close(products.project(x, f.mT.contiguous().mT), x @ f.T, **close)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    for first, second in ((left, right), (right, left)):
        wanted = (first.T @ second).to(wide)
        torch.testing.assert_close(products.outer_gradient(first, second), wanted, **close)
        scaled = products.outer_gradient(first, second, 0.5)
        torch.testing.assert_close(scaled, wanted * 0.5, **close)
    bias = torch.randn(rank).to(dtype)
    biased = products.project(x, f, bias, alpha=0.5)
    torch.testing.assert_close(biased, 0.5 * (x @ f.T) + bias, **close)


@pytest.mark.parametrize("way", ["compiled", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_low_rank_term_alone_added_and_in_place(dtype, way, monkeypatch):
    if way == "plain":
        monkeypatch.setattr(native, "library", lambda: native.Native(None, "switched off"))
    y = torch.randn(21, 33).to(dtype)
    for layout in (torch.Tensor.clone, *kit.LAYOUTS):
        s, g = torch.randn(21, 5).to(dtype), torch.randn(33, 5)
        term = products.LowRank(layout(s), layout(g), 0.5)
        wanted = 0.5 * s.double() @ g.to(dtype).double().T
        room = {"rtol": 1e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
        for found, start in (
            (term.product(dtype), None),
            (term.plus(layout(y)), y),
            (products.LowRank.added_to(y.clone(), term), y),
        ):
            total = wanted if start is None else wanted + start.double()
            torch.testing.assert_close(found, total.to(dtype), **room)


def test_sums_over_rows_may_exceed_fp16():
    eights = torch.full((4096, 3), 8.0, dtype=torch.float16)
    found = products.outer_gradient(eights, eights[:, :2], 0.125)
    assert found.tolist() == [[32768.0] * 2] * 3


def test_sums_are_formed_in_fp32_at_least():
    """4,096 bf16 ones sum to 4,096; a bf16 accumulator stops at 256."""
    ones = torch.ones(4096, 2, dtype=torch.bfloat16)
    assert products.column_sum(ones).dtype == torch.float32
    assert products.column_sum(ones).tolist() == [4096, 4096]
    assert products.inner(ones, ones).item() == 8192
    assert products.inner(ones.double(), ones.double()).dtype == torch.float64
