"""An adapter's passes over bf16: fp64 beside the way of several calls, and where they serve."""

import math

import pytest
import torch

from artemis_kernels.core import adapter_passes, thin_products
from artemis_kernels.core.dropped import Dropout
from artemis_kernels.core.products import outer_gradient
from artemis_kernels.core.units import Units
from tests import kit

BF16, F32 = torch.bfloat16, torch.float32
FACTOR, SIGMA = -1.5, 0.75
MASK = Dropout(0.3, torch.tensor([2**40 + 5]))
SHAPES = [
    (16, 1, 2),
    (17, 7, 33),
    (65, 64, 97),
    (130, 33, 40),
    (200, 128, 300),
    (70, 40, 8),
]  # rows, width, out

needs_pass = pytest.mark.skipif(
    not thin_products.available(), reason="no bf16 dot products, or no compiler that knows them"
)
pytestmark = needs_pass
EACH_SHAPE = pytest.mark.parametrize(("m", "w", "n"), SHAPES, ids=str)


def sliced(t: torch.Tensor) -> torch.Tensor:
    """Rows of stride 1, with nan right behind each."""
    wide = t.new_full((t.shape[0], t.shape[1] + 3), math.nan)
    wide[:, : t.shape[1]] = t
    return wide[:, : t.shape[1]]


def in_columns(t: torch.Tensor) -> torch.Tensor:
    return t.t().contiguous().t()


def operands(m: int, w: int, n: int, held: torch.dtype):
    """start or dY, z, U and its bias."""
    return (
        sliced(torch.randn(m, n).to(BF16)), sliced((2 * torch.randn(m, w)).to(BF16)),
        in_columns(torch.randn(n, w).to(held)), torch.randn(n).to(held),
    )  # fmt: skip


def units(activation: str, mask: Dropout | None, dtype: torch.dtype = F32) -> Units:
    return Units(activation, torch.tensor(SIGMA, dtype=dtype), mask)


@EACH_SHAPE
@pytest.mark.parametrize("held", [F32, BF16], ids=str)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "dropped"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "identity"])
def test_what_a_bottleneck_adds(m, w, n, held, mask, activation):
    start, z, up, bias = operands(m, w, n, held)
    h = units(activation, mask, torch.float64).forward(z.double(), biased=False)
    truth = start.double() + FACTOR * (h @ up.double().t() + SIGMA * bias.double())
    plain = start + FACTOR * (h.to(BF16) @ up.to(BF16).t() + SIGMA * bias.to(BF16))
    arguments = (z, up, bias, units(activation, mask), FACTOR)
    found = adapter_passes.bottleneck_forward(start, *arguments)
    kit.assert_accurate(found, truth, plain, BF16, c=1.0)
    within = start.clone(memory_format=torch.preserve_format)
    assert adapter_passes.bottleneck_forward(within, *arguments, out=within) is within
    assert torch.equal(within, found)
    without = adapter_passes.bottleneck_forward(start, z, up, None, *arguments[3:])
    truth = truth - FACTOR * SIGMA * bias.double()
    kit.assert_accurate(without, truth, plain, BF16, c=1.0)


@EACH_SHAPE
@pytest.mark.parametrize("held", [F32, BF16], ids=str)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "dropped"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "identity"])
def test_gradients_of_a_bottleneck(m, w, n, held, mask, activation):
    dy, z, up, bias = operands(m, w, n, held)

    def by_steps(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        at = [t.to(dtype) for t in (dy, z, up, bias)]
        of = units(activation, mask, dtype).backward(at[1], at[0] @ at[2], FACTOR, False, True)
        summed = FACTOR * at[0].sum(0, dtype=of.dz_sum.dtype)
        return {
            "dz": of.dz, "dz_sum": of.dz_sum, "up": outer_gradient(at[0], of.h, FACTOR),
            "bias_up": SIGMA * summed, "scale": FACTOR * of.inner + (summed * at[3]).sum(),
        }  # fmt: skip

    truth, plain = by_steps(torch.float64), by_steps(BF16)
    whole = torch.full((m, w + 4), 77.0, dtype=BF16)
    found = adapter_passes.bottleneck_backward(
        dy, z, up, bias, units(activation, mask), FACTOR, True, whole[:, 2:-2]
    )
    for name, value in found._asdict().items():
        kit.assert_accurate(value, truth[name], plain[name], BF16, c=1.25, name=name)
    assert (whole[:, :2] == 77.0).all() and (whole[:, -2:] == 77.0).all()
    alone = adapter_passes.bottleneck_backward(
        dy, z, up, None, units(activation, mask), FACTOR, False
    )
    assert torch.equal(alone.dz, found.dz) and alone.up is None and alone.bias_up is None
    kit.assert_accurate(
        alone.scale, truth["scale"] - (truth["bias_up"] / SIGMA * bias.double()).sum(),
        plain["scale"], BF16, c=1.25,
    )  # fmt: skip


@EACH_SHAPE
@pytest.mark.parametrize("held", [F32, BF16], ids=str)
@pytest.mark.parametrize("lay", [in_columns, torch.clone], ids=["columns", "rows"])
def test_gradients_of_a_low_rank_term(m, w, n, held, lay):
    dy, s, b, _ = operands(m, w, n, held)
    b = lay(b)

    def by_steps(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        at_dy, at_s, at_b = dy.to(dtype), s.to(dtype), b.to(dtype)
        before = outer_gradient(at_dy, at_s, FACTOR)
        dscale = (before * at_b).sum()
        return {"ds": FACTOR * SIGMA * at_dy @ at_b, "b": SIGMA * before, "scale": dscale}

    truth, plain = by_steps(torch.float64), by_steps(BF16)
    whole = torch.full((m, w + 4), 77.0, dtype=BF16)
    gain = torch.tensor(SIGMA)
    found = adapter_passes.low_rank_backward(
        dy, s, b, FACTOR, gain, True, True, True, whole[:, 2:-2]
    )
    for name, value in found._asdict().items():
        kit.assert_accurate(value, truth[name], plain[name], BF16, c=1.25, name=name)
    assert (whole[:, :2] == 77.0).all() and (whole[:, -2:] == 77.0).all()
    alone = adapter_passes.low_rank_backward(dy, s, b, FACTOR, gain, True, False, False)
    assert torch.equal(alone.ds, found.ds) and alone.b is None and alone.scale is None
    alone = adapter_passes.low_rank_backward(dy, s, b, FACTOR, gain, False, False, True)
    assert alone.ds is None and alone.b is None and torch.equal(alone.scale, found.scale)


def test_the_same_bits_on_any_number_of_threads():
    dy, z, up, bias = operands(333, 24, 100, F32)
    of, threads, every = (z, up, bias, units("gelu", MASK), FACTOR), torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        every.append([
            adapter_passes.bottleneck_forward(dy, *of),
            *adapter_passes.bottleneck_backward(dy, *of, True),
            *adapter_passes.low_rank_backward(dy, z, up, FACTOR, SIGMA, True, True, True),
        ])  # fmt: skip
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *every))


def test_gradients_have_storages_of_their_own():
    dy, z, up, bias = operands(64, 8, 40, F32)
    found = adapter_passes.bottleneck_backward(dy, z, up, bias, units("gelu", None), 1.0, True)
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)
    for tensor in found[1:]:
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()


@pytest.mark.parametrize(
    ("rows", "width", "out", "change"),
    [
        (15, 8, 40, None), (64, 129, 200, None), (64, 8, 40, torch.Tensor.float),
        (64, 8, 40, in_columns),
    ],
    ids=["few rows", "wide", "of fp32", "by columns"],
)  # fmt: skip
def test_where_the_passes_do_not_serve(rows, width, out, change):
    dy, z, up, bias = operands(rows, width, out, F32)
    dy = dy if change is None else change(dy)
    of = (z, up, bias, units("gelu", None), 1.0)
    assert adapter_passes.bottleneck_forward(dy, *of) is None
    assert adapter_passes.bottleneck_backward(dy, *of, True) is None
    assert adapter_passes.low_rank_backward(dy, z, up, 1.0, 1.0, True, True, True) is None
