"""dD and dU of a bottleneck in one launch, and the sum of their parts, against fp64 sums."""

from dataclasses import replace

import pytest
import torch

from artemis_kernels.core.device import CHIPS
from artemis_kernels.core.tiling import HEURISTICS, Shape
from artemis_kernels.ops.bottleneck_adapter.weight_gradients import sum_gradients, weight_gradients
from artemis_kernels.ops.low_rank.arguments import Scale
from tests import kit
from tests.kernels.truth import TINY, TINY_SPLIT, assert_close, rounded

pytestmark = pytest.mark.usefixtures("guarded_allocations")

# m, hidden, width: ragged everywhere; whole tiles; fewer rows than parts; wider than hidden
SHAPES = [(35, 50, 20), (32, 48, 16), (3, 5, 1), (20, 10, 40), (129, 17, 12)]
CONFIGS = pytest.mark.parametrize(
    "config", [TINY, TINY_SPLIT, replace(TINY, split=8)], ids=["whole", "3 parts", "8 parts"]
)
SCALE = Scale(0.5, torch.tensor(3.0))


def operands(m: int, k: int, r: int) -> tuple[torch.Tensor, ...]:
    """x, dY, dz and h."""
    return torch.randn(m, k), torch.randn(m, k), torch.randn(m, r), torch.randn(m, r)


def gradients(k: int, r: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Room for those of D, U, b_d and b_u."""
    return [torch.empty(size, dtype=dtype) for size in ((r, k), (k, r), (r,), (k,))]


@CONFIGS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_gradient(config, shape):
    m, k, r = shape
    x, dy, dz, h = operands(m, k, r)
    up, bias_up = torch.randn(r, k).t(), torch.randn(k)
    parts = weight_gradients(x, dy, dz, h, config=config, with_sums=True)
    assert parts.shape == (config.split, 2 * k * r + r + k) and parts.dtype == torch.float32
    found = gradients(k, r)
    dot = sum_gradients(parts, *found, scale=SCALE, against=(up, bias_up))
    x, dy, dz, h = (t.double() for t in (x, dy, dz, h))
    exact = dz.T @ x, dy.T @ h, dz.sum(0), dy.sum(0)
    for mine, wanted in zip(found, exact, strict=True):
        assert_close(mine, 1.5 * wanted)
    products = torch.cat(((exact[1] * up).flatten(), exact[3] * bias_up))
    assert dot.shape == () and dot.dtype == torch.float32
    assert abs(dot.double() - products.sum()) < 1e-5 * products.abs().sum()


@CONFIGS
def test_what_nobody_asks_for_is_left_out(config):
    x, dy, dz, h = operands(33, 18, 5)
    parts = weight_gradients(x, dy, dz, h, config=config)
    assert parts.shape == (config.split, 2 * 18 * 5)
    ddown, up = torch.empty(5, 18), torch.randn(18, 5)
    assert sum_gradients(parts, ddown, None) is None
    assert_close(ddown, dz.double().T @ x.double())
    dot = sum_gradients(parts, ddown, None, against=(up, None))
    exact = (dy.double().T @ h.double()) * up
    assert abs(dot.double() - exact.sum()) < 1e-5 * exact.abs().sum()


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.float16])
def test_in_16_bits(hidden_dtype):
    """Sums of rounded factors stay fp32 until the store in the parameter's dtype."""
    m, k, r = 70, 50, 20
    x, dy, dz, h = operands(m, k, r)
    x, dy, dz, h = x.half(), dy.half(), dz.to(hidden_dtype), h.half()
    parts = weight_gradients(x, dy, dz, h, config=TINY_SPLIT, with_sums=True)
    exact = rounded(dz, x).T @ x.double(), dy.double().T @ h.double(), dz.double().sum(0)
    for dtype, roundings in ((torch.float32, 1.0), (torch.float16, 0.52)):
        found = gradients(k, r, dtype)
        sum_gradients(parts, *found)
        for mine, wanted in zip(found, (*exact, dy.double().sum(0)), strict=True):
            assert_close(mine, wanted, roundings=roundings)


@pytest.mark.parametrize("layout", kit.LAYOUTS)
def test_any_strides(layout):
    x, dy, dz, h = operands(20, 33, 10)
    up = torch.randn(33, 10)
    outcomes = []
    for make in (layout, lambda t: t):
        parts = weight_gradients(make(x), make(dy), dz, h, config=TINY_SPLIT, with_sums=True)
        found = gradients(33, 10)
        outcomes.append([*found, sum_gradients(parts, *found, against=(make(up), None))])
    for mine, wanted in zip(*outcomes, strict=True):
        kit.assert_same_bits(mine, wanted)


def test_gradients_of_stride_zero():
    x, _, dz, h = operands(20, 33, 10)
    dy = torch.full((), 0.5).expand(20, 33)
    found = gradients(33, 10)
    sum_gradients(weight_gradients(x, dy, dz, h, config=TINY, with_sums=True), *found)
    assert_close(found[1], dy.double().T @ h.double())


def test_no_rows():
    x, dy, dz, h = operands(0, 6, 3)
    parts = weight_gradients(x, dy, dz, h, config=TINY_SPLIT, with_sums=True)
    found = gradients(6, 3)
    sum_gradients(parts, *found)
    assert len(parts) == 0 and all((gradient == 0).all() for gradient in found)


def test_parts_fill_the_chip():
    """Two sums share the launch: half the parts that each would need alone, and no part empty."""
    chip, both = CHIPS["sm_90"], HEURISTICS["weight_gradients"]
    shape = Shape(8192, k=4096, r=64)
    one = HEURISTICS["shrink_backward"](shape, chip)
    joint = both(shape, chip)
    assert joint == replace(one, split=one.split // 2) and joint.split > 1
    programs = 2 * (4096 // joint.block_k) * joint.split
    assert chip.processors < programs <= 2 * chip.processors
    assert both(shape._replace(m=64), chip).split == 1
