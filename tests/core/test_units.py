"""The units of a bottleneck: the compiled pass against fp64, and against plain torch."""

import math

import pytest
import torch

from artemis_kernels.core import native
from artemis_kernels.core.activations import ACTIVATIONS
from artemis_kernels.core.dropped import Dropout
from artemis_kernels.core.native import Native
from artemis_kernels.core.units import Units
from tests import kit

needs_library = pytest.mark.skipif(
    native.library().handle is None, reason=f"no compiled passes: {native.library().reason}"
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
FACTOR, SCALE = -1.5, torch.tensor(0.75)
RESULTS = ("h", "dz", "h again", "dz_sum", "inner")


def outcome(z, dh, activation, mask, *, biased=True, scale=SCALE):
    """Forward and backward by name."""
    units = Units(activation, scale, mask)
    backward = units.backward(z, dh.clone(), FACTOR, biased, needs_h=True)
    return dict(zip(RESULTS, (units.forward(z, biased), *backward), strict=True))


@pytest.fixture
def plainly(monkeypatch):
    """`outcome` with the compiled passes taken away."""

    def run(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: Native(None, "taken away by the test"))
            return outcome(*arguments, **options)

    return run


@needs_library
@DTYPES
@pytest.mark.parametrize("activation", kit.ACTIVATIONS)
# 512 units are a block of a row, 64 rows a partial sum; an odd width starts rows in mid-hash.
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (65, 7), (130, 64), (3, 515), (400, 96)])
def test_passes_follow_the_accuracy_rule(plainly, dtype, activation, rows, width):
    z, dh = (3 * torch.randn(rows, width)).to(dtype), torch.randn(rows, width).to(dtype)
    for mask in (None, Dropout(0.3, torch.tensor([2**40 + 5]))):
        truth = outcome(z.double(), dh.double(), activation, mask, scale=SCALE.double())
        fast, plain = outcome(z, dh, activation, mask), plainly(z, dh, activation, mask)
        for name in RESULTS:
            # c: another order of sums, and another approximation of the same function.
            kit.assert_accurate(fast[name], truth[name], plain[name], dtype, c=1.25, name=name)


@needs_library
@pytest.mark.parametrize("activation", kit.ACTIVATIONS)
def test_fp32_values_are_right_to_the_last_bits(activation):
    """What the kernel of a smooth activation stores in fp32 is at most one rounding off."""
    z = torch.cat((torch.linspace(-14, 14, 20_001), torch.logspace(-30, 30, 61)))
    z = torch.cat((z, -z)).view(-1, 1)
    h = Units(activation, None, None).forward(z, biased=False)
    dz = Units(activation, None, None).backward(z, torch.ones_like(z), 1.0, False, False).dz
    exact = z.double()
    value = ACTIVATIONS[activation].forward(exact)
    slope = ACTIVATIONS[activation].backward(torch.ones_like(exact), exact)
    torch.testing.assert_close(h.double(), value, rtol=2e-7, atol=1e-15)
    torch.testing.assert_close(dz.double(), slope, rtol=2e-7, atol=3e-8)


@needs_library
@pytest.mark.parametrize("activation", kit.ACTIVATIONS)
def test_not_finite_stays_not_finite(plainly, activation):
    z = torch.tensor([[math.inf, math.nan, 1.0, -1.0]])
    fast = outcome(z, torch.ones_like(z), activation, None)
    plain = plainly(z, torch.ones_like(z), activation, None)
    for name in ("h", "dz"):
        assert torch.equal(torch.isnan(fast[name][0, 1:2]), torch.isnan(plain[name][0, 1:2]))
        torch.testing.assert_close(fast[name][:, 2:4], plain[name][:, 2:4])
    assert fast["h"][0, 0] == math.inf  # torch's own gelu may give nan here


@needs_library
@DTYPES
def test_a_dropped_unit_is_zero_whatever_it_was(dtype):
    mask = Dropout(0.5, torch.tensor([1]))
    z = torch.full((20, 8), math.nan, dtype=dtype)
    result = outcome(z, torch.full_like(z, math.inf), "silu", mask, biased=False)
    dropped = result["h"] == 0
    assert 0 < dropped.sum() < z.numel() and (result["dz"][dropped] == 0).all()


@needs_library
@DTYPES
def test_any_layout(dtype):
    z, dh = torch.randn(33, 12).to(dtype), torch.randn(33, 12).to(dtype)
    for layout in kit.LAYOUTS:
        kit.assert_same_outcome(
            outcome(layout(z), layout(dh), "gelu", None), outcome(z, dh, "gelu", None)
        )


@needs_library
def test_same_bits_whatever_the_threads():
    z, dh, threads = torch.randn(700, 65), torch.randn(700, 65), torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(outcome(z, dh, "gelu", Dropout(0.1, torch.tensor([4]))))
    torch.set_num_threads(threads)
    kit.assert_same_outcome(results[1], results[0])
    kit.assert_same_outcome(results[2], results[0])
