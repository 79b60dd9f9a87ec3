"""Dropped tensors and thin products of them: the compiled passes against plain torch."""

import math

import pytest
import torch

from artemis_kernels.core import native, rng
from artemis_kernels.core.dropped import (
    Dropout,
    add_dropped_product_,
    dropped,
    outer_dropped,
    project_dropped,
)
from artemis_kernels.core.native import Native
from tests import kit

needs_library = pytest.mark.skipif(
    native.library().handle is None, reason=f"no compiled passes: {native.library().reason}"
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
MASKS = [Dropout(p, torch.tensor([seed])) for p, seed in ((0.1, 3), (0.5, -8), (0.99, 2**62 + 1))]


@pytest.fixture
def plainly(monkeypatch):
    """Call a function with the compiled passes taken away."""

    def run(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: Native(None, "taken away by the test"))
            return function(*arguments)

    return run


# 8,192 elements are a chunk of the compiled pass; from 65,536 on it uses threads.
@needs_library
@DTYPES
@pytest.mark.parametrize("count", [0, 1, 7, 8191, 8192, 8193, 65_537, 100_001])
def test_dropped_is_the_same_bits(plainly, dtype, count):
    x = torch.randn(count).to(dtype)
    x[: count // 4 : 3] = -0.0
    if count > 100:
        x[5:60:3], x[6:60:3], x[7:60:3] = math.inf, -math.inf, 1e-40
        x[70:99] = math.nan
    for mask in MASKS:
        fast, plain = dropped(x, mask), plainly(dropped, x, mask)
        nan = torch.isnan(plain)
        assert torch.equal(torch.isnan(fast), nan)
        kit.assert_same_bits(fast[~nan], plain[~nan])


# Columns are taken 1,024 at a time, ranks four at a time, rows of a gradient in parts of 64.
THIN = pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [(1, 1, 1), (5, 7, 3), (64, 1024, 8), (65, 1025, 5), (130, 2049, 4), (3, 40, 32), (3, 40, 33)],
)


@needs_library
@DTYPES
@THIN
def test_thin_products_of_a_dropped_x(plainly, dtype, rows, columns, rank):
    """Held to the fp64 product of the same dropped x by the accuracy rule."""
    x, a = torch.randn(rows, columns).to(dtype), torch.randn(rank, columns).to(dtype)
    ds, dx = torch.randn(rows, rank).to(dtype), torch.randn(rows, columns).to(dtype)
    for mask in MASKS:
        keep = rng.dropout_mask(x.shape, *mask, "cpu") * rng.keep_scale(mask.p)
        truth = {
            "shrink": (x.double() * keep) @ a.double().T,
            "outer": ds.double().T @ (x.double() * keep),
            "expand": dx.double() + ds.double() @ a.double() * keep,
        }

        def products(mask=mask):
            return {
                "shrink": project_dropped(x, a, mask),
                "outer": outer_dropped(ds, x, mask).to(dtype),
                "expand": add_dropped_product_(dx.clone(), ds, a, mask),
            }

        fast, plain = products(), plainly(products)
        for name, wanted in truth.items():
            assert fast[name].dtype == dtype
            # c: the same sum as BLAS's in another order, and no more.
            kit.assert_accurate(fast[name], wanted, plain[name], dtype, c=2, name=name)


@needs_library
@DTYPES
@pytest.mark.parametrize(("rows", "columns", "rank"), [(1, 1, 1), (5, 7, 3), (65, 1025, 5)])
def test_any_layout(dtype, rows, columns, rank):
    """The passes read contiguous memory; whatever comes in is brought into that form."""
    x, a = torch.randn(rows, columns).to(dtype), torch.randn(rank, columns).to(dtype)
    ds = torch.randn(rows, rank).to(dtype)
    mask = MASKS[0]
    for layout in kit.LAYOUTS:
        kit.assert_same_bits(dropped(layout(x), mask), dropped(x, mask))
        kit.assert_same_bits(
            project_dropped(layout(x), layout(a), mask), project_dropped(x, a, mask)
        )
        kit.assert_same_bits(outer_dropped(layout(ds), layout(x), mask), outer_dropped(ds, x, mask))


@needs_library
def test_same_bits_whatever_the_threads():
    x, a, ds = torch.randn(301, 1001), torch.randn(6, 1001), torch.randn(301, 6)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(
            {
                "dropped": dropped(x, MASKS[0]),
                "shrink": project_dropped(x, a, MASKS[0]),
                "outer": outer_dropped(ds, x, MASKS[0]),
                "expand": add_dropped_product_(x.clone(), ds, a, MASKS[0]),
            }
        )
    torch.set_num_threads(threads)
    kit.assert_same_outcome(results[1], results[0])
    kit.assert_same_outcome(results[2], results[0])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_dropped_values_are_zero_even_where_x_is_not_finite(dtype):
    x, mask = torch.full((64,), math.nan, dtype=dtype), Dropout(0.5, torch.tensor([1]))
    keep = rng.dropout_mask((64,), *mask, "cpu")
    out = dropped(x, mask)
    assert (out[~keep] == 0).all() and torch.isnan(out[keep]).all()
