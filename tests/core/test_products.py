"""Thin products: whatever orientation is computed, the value is the plain one's."""

import pytest
import torch

from artemis_kernels.core import products


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 16, 17, 40])  # 16 is where the orientation changes
def test_equal_plain_products(rank, dtype):
    x, f = torch.randn(9, 21).to(dtype), torch.randn(rank, 21).to(dtype)
    left, right = torch.randn(9, 20).to(dtype), torch.randn(9, rank).to(dtype)
    close = {"rtol": 1e-2, "atol": 1e-1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(products.project(x, f), x @ f.T, **close)
    torch.testing.assert_close(products.project(x, f.mT.contiguous().mT), x @ f.T, **close)
    torch.testing.assert_close(products.outer_gradient(left, right), left.T @ right, **close)
    torch.testing.assert_close(products.outer_gradient(right, left), right.T @ left, **close)


def test_sums_are_formed_in_fp32_at_least():
    """4,096 bf16 ones sum to 4,096; a bf16 accumulator stops at 256."""
    ones = torch.ones(4096, 2, dtype=torch.bfloat16)
    assert products.column_sum(ones).dtype == torch.float32
    assert products.column_sum(ones).tolist() == [4096, 4096]
    assert products.inner(ones, ones).item() == 8192
    assert products.inner(ones.double(), ones.double()).dtype == torch.float64
