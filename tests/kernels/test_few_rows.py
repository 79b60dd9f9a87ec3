"""The kernels for one to four rows, one by one, against fp64 sums of what is stored.

Allocations are poisoned and the bands round them checked; tiles are smaller than the matrices.
"""

from dataclasses import replace

import pytest
import torch

from artemis_kernels.core.quantized import FORMATS, QuantizedWeight
from artemis_kernels.core.strategies import TENSOR
from artemis_kernels.core.tiling import Config
from artemis_kernels.ops.few_rows.matvec import matvec
from artemis_kernels.ops.few_rows.shrink import shrink_rows
from artemis_kernels.ops.packed.epilogue import Epilogue
from tests import kit
from tests.kernels.packed import terms
from tests.kernels.truth import assert_close, units

pytestmark = pytest.mark.usefixtures("guarded_allocations")

TINY = Config(0, 4, 64, warps=1, stages=1)
CONFIGS = pytest.mark.parametrize(
    "config", [TINY, replace(TINY, block_n=1, block_k=32), replace(TINY, block_n=8, block_k=256)]
)
# m, k, n, r: ragged everywhere; whole tiles; one row, one column; a wide rank; less than a tile
SHAPES = [(3, 200, 41, 20), (4, 128, 32, 16), (1, 72, 1, 1), (2, 640, 9, 100), (1, 8, 7, 5)]
BASES = [(TENSOR, None), ("int8", None), ("fp8", None), ("int4", 8), ("int4", 64)]
BASE = pytest.mark.parametrize(("format", "group"), BASES, ids=str)


def base(n: int, k: int, format: str, group: int | None, dtype: torch.dtype):
    weight = torch.randn(n, k) / k**0.5
    if format == TENSOR:
        return weight.to(dtype)
    size = group if group is None or k % group == 0 else 8
    return QuantizedWeight.quantize(weight, format, group_size=size)


def numbers(weight) -> torch.Tensor:
    return weight.double() if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float64)


def added(epilogue: Epilogue) -> torch.Tensor:
    sigma = (epilogue.scale.number * epilogue.scale.tensor).double()
    low = epilogue.s.double() @ epilogue.b.double().t() + epilogue.bias_low.double()
    return sigma * low + epilogue.bias.double()


@CONFIGS
@BASE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_matvec(config, format, group, shape, dtype):
    m, k, n, r = shape
    x, weight = torch.randn(m, k).to(dtype), base(n, k, format, group, dtype)
    epilogue = terms(m, n, r)
    y = matvec(x, weight, epilogue, config=config)
    assert y.dtype == dtype
    # One rounding of the sum: nothing before it is rounded.
    exact = x.double() @ numbers(weight).t()
    assert_close(y, exact + added(epilogue), roundings=0.502)
    assert_close(matvec(x, weight, Epilogue(), config=config), exact, roundings=0.502)


@BASE
def test_bf16(format, group):
    """No dot in it: the interpreter does bf16 as well, but for cutting what it stores."""
    x, weight = torch.randn(2, 200).bfloat16(), base(13, 200, format, group, torch.bfloat16)
    y = matvec(x, weight, Epilogue(bias=torch.ones(13)), config=TINY)
    assert_close(y, x.double() @ numbers(weight).t() + 1)


def test_every_e4m3_number_is_read():
    """All finite bytes, subnormal and negative ones among them, one by one."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    data = torch.zeros(len(codes), 8, dtype=torch.uint8)
    data[:, 3] = codes
    weight = QuantizedWeight(
        data.view(torch.float8_e4m3fn), torch.ones(len(codes)), None, "fp8", None
    )
    y = matvec(torch.ones(1, 8), weight, Epilogue(), config=TINY)
    assert torch.equal(y[0], codes.view(torch.float8_e4m3fn).float())


@BASE
def test_strides(format, group):
    """x of any, S and B inside wider matrices, rows of a wider W."""
    weight, (m, k, n, r) = base(33, 64, format, group, torch.float32), (3, 64, 33, 5)
    x, s, b = torch.randn(m, k), torch.randn(m, 2 * r), torch.randn(r, n)
    wanted = matvec(x, weight, Epilogue(s[:, r:].contiguous(), b.t().contiguous()), config=TINY)
    if format == TENSOR:
        wide = torch.randn(n, 2 * k)
        wide[:, k:] = weight
        weight = wide[:, k:]
    y = matvec(x.t().contiguous().t(), weight, Epilogue(s[:, r:], b.t()), config=TINY)
    kit.assert_same_bits(y, wanted)


def test_a_row_does_not_depend_on_the_others():
    """And neither do its bits: a token is what it is in any small batch."""
    x, weight = torch.randn(4, 96), base(17, 96, "int8", None, torch.float32)
    together = matvec(x, weight, Epilogue(), config=TINY)
    for row in range(4):
        kit.assert_same_bits(
            together[row], matvec(x[row : row + 1], weight, Epilogue(), config=TINY)[0]
        )


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_past_the_end_is_read(format):
    """What lies behind the last row and its scale is nan, or another's."""
    weight = base(5, 72, format, 8 if format == "int4" else None, torch.float32)
    x = torch.full((2, 80), torch.nan)
    x[:, :72] = torch.randn(2, 72)
    y = matvec(x[:, :72], weight, Epilogue(), config=TINY)
    assert_close(y, x[:, :72].double() @ numbers(weight).t())


@CONFIGS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("f_dtype", [torch.float32, torch.float16], ids=str)
def test_shrink(config, shape, f_dtype):
    m, k, _, r = shape
    x, f, bias = torch.randn(m, k).half(), (torch.randn(r, k) / k**0.5).to(f_dtype), torch.randn(r)
    exact = x.double() @ f.double().t()
    s, nothing = shrink_rows(x, f, config=config)
    assert_close(s, exact)
    assert nothing is None
    z, h = shrink_rows(
        x, f, config=config, stage="forward", bias=bias, activation="gelu", with_h=True
    )
    assert_close(z, exact + bias.double())
    assert h.dtype == x.dtype
    assert_close(h, units(z, "gelu"))


def test_no_rows():
    x = torch.randn(0, 64)
    assert matvec(x, torch.randn(5, 64), Epilogue(), config=TINY).shape == (0, 5)
    assert shrink_rows(x, torch.randn(5, 64), config=TINY)[0].shape == (0, 5)
