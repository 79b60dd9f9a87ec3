"""The kernels over packed weights, one by one: fp64 sums, exact integers, the eager rounding.

Tiles are smaller than the matrices; allocations are poisoned, the bands round them checked.
"""

from dataclasses import replace

import pytest
import torch

from artemis_kernels.core import eight_bit as eager
from artemis_kernels.core.quantized import FORMATS, QuantizedWeight
from artemis_kernels.ops.packed.eight_bit import eight_bit
from artemis_kernels.ops.packed.epilogue import Epilogue, finish
from artemis_kernels.ops.packed.round_rows import round_rows
from artemis_kernels.ops.packed.transpose import transpose
from artemis_kernels.ops.packed.unpack import unpack
from artemis_kernels.ops.packed.weight_only import weight_only
from tests import kit
from tests.kernels.packed import TINY, added, terms
from tests.kernels.truth import assert_close, dropout

pytestmark = pytest.mark.usefixtures("guarded_allocations")

SPLITS = pytest.mark.parametrize("config", [TINY, replace(TINY, split=3)], ids=["whole", "split"])
# m, k, n, r: ragged tiles everywhere; whole tiles; less than a tile; many steps and a wide rank
SHAPES = [(35, 72, 41, 20), (32, 64, 32, 16), (3, 8, 7, 1), (17, 320, 66, 33)]
GROUPS = {"int8": [None], "fp8": [None], "int4": [8, 64]}
FORMAT_AND_GROUP = pytest.mark.parametrize(
    ("format", "group"), [(f, g) for f in FORMATS for g in GROUPS[f]], ids=str
)


def packed_weight(n: int, k: int, format: str, group: int | None) -> QuantizedWeight:
    size = group if group is None or k % group == 0 else 8
    return QuantizedWeight.quantize(torch.randn(n, k) / k**0.5, format, group_size=size)


@SPLITS
@FORMAT_AND_GROUP
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weight_only(config, format, group, shape, dtype):
    m, k, n, r = shape
    x, weight = torch.randn(m, k).to(dtype), packed_weight(n, k, format, group)
    epilogue = terms(m, n, r)
    y = weight_only(x, weight, epilogue, config=config)
    used = weight.dequantize(dtype if format == "int4" else torch.float64)
    assert y.dtype == dtype
    assert_close(y, x.double() @ used.double().t() + added(epilogue, dtype), roundings=0.52)


@pytest.mark.parametrize("format", FORMATS)
def test_weight_only_bare_and_with_dropout(format):
    x, weight = torch.randn(20, 64), packed_weight(33, 64, format, None)
    bare = weight_only(x, weight, Epilogue(), config=TINY)
    exact = x.double() @ weight.dequantize(torch.float64).t()
    assert_close(bare, exact)
    epilogue = terms(20, 33, 5, dropout())
    for config in (TINY, replace(TINY, split=2)):
        y = weight_only(x, weight, epilogue, config=config)
        assert_close(y, exact + added(epilogue, torch.float32))


@pytest.mark.parametrize("layout", kit.LAYOUTS)
@FORMAT_AND_GROUP
def test_weight_only_takes_x_of_any_strides(layout, format, group):
    x, weight = torch.randn(20, 64), packed_weight(33, 64, format, group)
    kit.assert_same_bits(
        weight_only(layout(x), weight, Epilogue(), config=TINY),
        weight_only(x, weight, Epilogue(), config=TINY),
    )


@FORMAT_AND_GROUP
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_is_dequantize(format, group, dtype, shape):
    """Within the one rounding; a fused multiply-add may round differently."""
    weight = packed_weight(shape[2], shape[1], format, group)
    dense, wanted = unpack(weight, dtype, config=TINY), weight.dequantize(torch.float64)
    assert dense.dtype == dtype and dense.shape == wanted.shape
    assert ((dense - wanted).abs() <= 0.501 * torch.finfo(dtype).eps * wanted.abs() + 4e-8).all()


def test_every_e4m3_number_is_read():
    """All finite bytes, subnormal and negative ones among them."""
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers = numbers[(numbers & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    data = torch.cat((numbers, numbers[:2]))[None].contiguous()
    weight = QuantizedWeight(data, torch.ones(1), None, "fp8", None)
    kit.assert_same_bits(unpack(weight, torch.float32, config=TINY), data.float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    ("n", "k"),
    [(1, 1), (1, 200), (200, 1), (7, 5), (32, 64), (33, 65), (96, 128), (41, 200), (200, 41)],
    ids=str,
)
def test_transpose_moves_every_byte(n, k, dtype):
    """Bits, e4m3's nan and −0 among them; a tile of 32 × 64 is not its own transpose."""
    codes = torch.randint(256, (n, k), dtype=torch.uint8)
    wanted = torch.from_numpy(codes.numpy().T.copy()).view(dtype)
    for data in (codes.view(dtype), kit.transposed(codes).view(dtype)):
        out = transpose(data, config=replace(TINY, block_k=64))
        assert out.is_contiguous()
        kit.assert_same_bits(out, wanted)


WHOLE_ROWS = replace(TINY, block_m=2, block_k=512)  # in registers; else in steps along them
BY_STEPS_OR_WHOLE = pytest.mark.parametrize("config", [TINY, WHOLE_ROWS], ids=["steps", "whole"])


@BY_STEPS_OR_WHOLE
@pytest.mark.parametrize("factor", [False, True], ids=["x", "scaled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (5, 33), (35, 300)], ids=str)
def test_int8_rows_are_those_of_the_eager_path(m, k, dtype, factor, config):
    x, by = torch.randn(m, k).to(dtype), torch.rand(k) + 0.5 if factor else None
    mine, wanted = round_rows(x, torch.int8, by, config=config), eager.round_rows(x, by)
    apart = [] if wanted.apart is None else wanted.apart.tolist()
    counted = [] if mine.apart is None else mine.columns[mine.apart.any(0)].tolist()
    assert sorted(apart) == sorted(counted)
    torch.testing.assert_close(mine.scale, wanted.scale, rtol=1e-6, atol=0)
    assert (mine.q.int() - wanted.q.int()).abs().max() <= 1
    assert (mine.q != wanted.q).float().mean() < 0.002  # on the edge of two levels


@BY_STEPS_OR_WHOLE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [False, True], ids=["x", "scaled"])
def test_fp8_rows(dtype, factor, config):
    x, by = torch.randn(35, 100).to(dtype), torch.rand(100) + 0.5 if factor else None
    mine = round_rows(x, torch.float8_e4m3fn, by, config=config)
    v = x.float() if by is None else x.float() * by
    torch.testing.assert_close(mine.scale, v.abs().amax(1) / 448, rtol=1e-6, atol=0)
    assert mine.apart is None and mine.q.dtype == torch.float8_e4m3fn
    nearest = (v / mine.scale[:, None]).to(torch.float8_e4m3fn).double()
    assert (mine.q.double() == nearest).float().mean() > 0.998  # all but ties of the division
    error = (mine.q.double() * mine.scale[:, None].double() - v.double()).abs()
    assert (error <= v.abs() * 2.0**-4 * 1.001 + mine.scale[:, None] * 2.0**-10 * 1.001).all()


@BY_STEPS_OR_WHOLE
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_rows_that_are_not_numbers_and_rows_of_nothing(dtype, config):
    x = torch.randn(6, 40)
    x[0], x[1] = 0, 1e-38
    x[3, 5], x[4, 6] = torch.nan, -torch.inf
    mine = round_rows(x, dtype, None, config=config)
    assert (mine.scale[:2] == 0).all() and (mine.q[:2].float() == 0).all()
    broken = mine.scale.isnan()
    if mine.apart is not None:
        broken |= ~mine.apart.isfinite().all(1)
    assert broken.tolist() == [False, False, False, True, True, False]
    assert mine.q.float().isfinite().all()


def test_one_large_column_is_kept_apart():
    x = torch.ones(9, 130)
    x[8, 77] = -300
    mine = round_rows(x, torch.int8, None, config=TINY)
    assert (mine.q[:, 77] == 0).all() and mine.scale.allclose(torch.tensor(1 / 127))
    at = mine.columns.tolist().index(77)
    assert torch.equal(mine.apart[:, at], x[:, 77])
    mine.apart[:, at] = 0
    assert not mine.apart.any()


@pytest.mark.parametrize("shape", [*SHAPES, (2, 1, 1, 1), (33, 1301, 5, 3)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_int8_sums_are_exact(shape, transposed):
    """Against int64, extreme values and a sum beyond 2²⁴ among them."""
    m, k, n, _ = shape
    q = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    q[:1], w[:1] = 127, -127
    truth = torch.from_numpy(q.numpy().astype("int64") @ w.numpy().astype("int64").T)
    w = w.t().contiguous().t() if transposed else w
    y = torch.empty(m, n)
    eight_bit(q, w, y, Epilogue(), config=TINY)
    kit.assert_same_bits(y, truth.to(torch.float32))


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eight_bit_with_everything_on(format, shape, precise):
    m, k, n, r = shape
    x, weight = torch.randn(m, k).half(), packed_weight(n, k, format, None)
    x[:, 2] *= 30
    q = round_rows(x, weight.data.dtype, None, config=TINY)
    wa = None
    exact = (q.q.double() * q.scale[:, None]) @ weight.dequantize(torch.float64).t()
    if q.apart is not None:
        wa = weight.dequantize(torch.float32)[:, q.columns].half()
        exact += q.apart.double() @ wa.double().t()
    epilogue = terms(m, n, r)._replace(row=q.scale, column=weight.scale, xa=q.apart, wa=wa)
    y = torch.empty(m, n, dtype=torch.float16)
    eight_bit(q.q, weight.data, y, epilogue, config=TINY, precise=precise)
    assert_close(y, exact + added(epilogue, torch.float16), roundings=0.55)


def test_finish_adds_in_order_and_takes_int32():
    parts = torch.randint(-1000, 1000, (3, 20, 37), dtype=torch.int32)
    epilogue = terms(20, 37, 5)._replace(row=torch.rand(20), column=torch.rand(37))
    y = torch.empty(20, 37)
    finish(parts, y, epilogue, config=TINY)
    exact = parts.sum(0).double() * epilogue.row.double()[:, None] * epilogue.column.double()
    assert_close(y, exact + added(epilogue, torch.float32))


def test_scale_multiplies_before_the_one_rounding():
    """The low-rank term errs by the rounding of its operands, not by one of its own."""
    weight, epilogue = packed_weight(33, 64, "int8", None), terms(20, 33, 10)
    y = weight_only(torch.zeros(20, 64).half(), weight, epilogue, config=TINY)
    assert_close(y, added(epilogue, torch.float16), roundings=0.52)
