"""Which columns are kept apart, and their weights, bit for bit against the formulas in torch.

Columns are ordered by torch's stable sort and compared with its `nanmedian`; neither is what the
kernel does.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from artemis_kernels.core import tuning
from artemis_kernels.core.device import CHIPS, INTERPRETER
from artemis_kernels.core.eight_bit_rows import APART, FEWEST_PER_COLUMN_APART
from artemis_kernels.core.quantized import QuantizedWeight
from artemis_kernels.core.tiling import Config, Shape
from artemis_kernels.ops.packed import steps
from artemis_kernels.ops.packed.columns_apart import column_max, set_apart, weights_apart
from artemis_kernels.ops.packed.epilogue import MOST_APART
from artemis_kernels.ops.packed.round_rows import round_rows
from tests import kit

pytestmark = pytest.mark.usefixtures("guarded_allocations")

TINY = Config(16, 64, 64, warps=1, stages=1)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
FACTOR = pytest.mark.parametrize("scaled", [False, True], ids=["x", "scaled"])
# The fewest, around two thresholds of A, a block of the kernel exactly and around it, several.
COLUMNS = [2, 3, 127, 128, 1023, 1024, 4096, 4097, 9001]
INF, NAN = torch.inf, torch.nan


def truth(largest: torch.Tensor, factor: torch.Tensor | None):
    """kept, columns and which of them count, of the largest magnitudes [K]."""
    most = min(MOST_APART, max(1, largest.numel() // FEWEST_PER_COLUMN_APART))
    felt = largest if factor is None else largest * factor.abs()
    columns = felt.sort(descending=True, stable=True).indices[:most]
    stands_out = felt[columns] > APART * felt.nanmedian()
    factor = torch.ones_like(largest) if factor is None else factor
    return factor.index_fill(0, columns[stands_out], 0.0), columns, stands_out


def few(k: int) -> torch.Tensor:
    largest = torch.rand(k) + 0.5
    largest[torch.randperm(k)[: max(1, k // 400)]] *= 50
    return largest


def many(k: int) -> torch.Tensor:
    """More than may be kept apart."""
    largest = torch.rand(k) + 0.5
    largest[torch.randperm(k)[: max(1, k // 3)]] *= 50
    return largest


def alike(k: int) -> torch.Tensor:
    """Equal ones on either side of four medians."""
    largest = torch.ones(k)
    largest[torch.randperm(k)[: max(1, k // 3)]] = 8.0
    return largest


def lower_median(k: int) -> torch.Tensor:
    """One half 1, the other 2, and one that exceeds four times the lower median only."""
    largest = torch.ones(k)
    largest[torch.randperm(k)[: k // 2]] = 2.0
    largest[largest.argmax()] = 4.5
    return largest


def four_medians(k: int) -> torch.Tensor:
    """Four medians do not stand out, the next number does."""
    largest = torch.full((k,), 0.7)
    largest[k // 2] = 4 * largest[0]
    largest[k - 1] = torch.nextafter(4 * largest[0], torch.tensor(INF))
    return largest


def mostly_nothing(k: int) -> torch.Tensor:
    """A median of 0, and numbers without an exponent."""
    largest = torch.zeros(k)
    largest[:: max(3, k // 20)] = 1e-44
    return largest


def infinite(k: int) -> torch.Tensor:
    largest = torch.rand(k) + 0.5
    largest[torch.randperm(k)[: max(1, k // 5)]] = INF
    return largest


def all_infinite(k: int) -> torch.Tensor:
    return torch.full((k,), INF)


def overflowing(k: int) -> torch.Tensor:
    """Four medians are inf."""
    return few(k).clamp(max=3.0) * 1e38


DISTRIBUTIONS = [
    torch.ones, torch.zeros, torch.rand, few, many, alike, lower_median, four_medians,
    mostly_nothing, infinite, all_infinite, overflowing,
]  # fmt: skip


def parted(largest: torch.Tensor, parts: int) -> torch.Tensor:
    """Partial maxima, each column's largest in any of them."""
    made = torch.empty(parts, largest.numel())
    made.copy_(largest.nan_to_num(posinf=1.0) * torch.rand(parts, 1))
    return made.scatter_(0, torch.randint(parts, (1, largest.numel())), largest[None])


def assert_apart(found, wanted) -> None:
    kept, columns, stands_out = wanted
    assert found.columns.tolist() == columns.tolist()
    assert found.counts.tolist() == stands_out.int().tolist()
    kit.assert_same_bits(found.kept, kept)


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(("m", "k"), [(1, 40), (35, 33), (97, 8)], ids=str)
def test_column_max(m, k, split):
    x = torch.randn(m, k).half()
    parts = column_max(x.t().contiguous().t(), config=replace(TINY, split=split))
    kit.assert_same_bits(parts.amax(0), x.abs().amax(0).float())


@FACTOR
@pytest.mark.parametrize("made", DISTRIBUTIONS, ids=lambda made: made.__name__)
@pytest.mark.parametrize("k", COLUMNS)
def test_the_columns_are_those_of_a_sort_and_a_median(k, made, scaled):
    largest = made(k)
    factor = torch.randn(k).exp2() * torch.randn(k).sign() if scaled else None
    found = set_apart(parted(largest, 3), factor)
    assert_apart(found, truth(largest, factor))


@pytest.mark.parametrize("parts", [1, 2, 4, 9])
def test_any_number_of_parts(parts):
    largest = few(1000)
    assert_apart(set_apart(parted(largest, parts), None), truth(largest, None))


@pytest.mark.parametrize("nans", [1, 2, 20, 199, 200])
def test_a_factor_that_is_no_number(nans):
    """Among the largest, but never above the median, which is that of the others."""
    largest, factor = few(200), torch.rand(200)
    factor[torch.randperm(200)[:nans]] = NAN
    largest[7], factor[7] = INF, 0.0
    assert_apart(set_apart(parted(largest, 3), factor), truth(largest, factor))
    assert_apart(set_apart(parted(largest, 3), -factor), truth(largest, -factor))


def test_the_median_is_that_of_the_numbers():
    """Of 198, the lower one, which two nan would move."""
    largest, factor = torch.ones(200), torch.ones(200)
    factor[[3, 151]] = NAN
    largest[torch.arange(0, 198, 2)] = 2.0
    largest[100] = 4.5
    assert largest[factor == 1].sort().values[97:100].tolist() == [1.0, 1.0, 2.0]
    found = set_apart(parted(largest, 3), factor)
    assert found.columns.tolist() == [3, 151, 100] and found.counts.tolist() == [0, 0, 1]
    assert_apart(found, truth(largest, factor))


@DTYPES
@FACTOR
@pytest.mark.parametrize(("m", "k"), [(1, 2), (1, 300), (16, 128), (35, 65), (40, 1100)], ids=str)
def test_rows_and_their_columns_apart(m, k, scaled, dtype):
    """What counts of x is in `apart` and not in q; what does not is in q and 0 in `apart`."""
    x, factor = torch.randn(m, k), torch.rand(k) + 0.5 if scaled else None
    x[:, torch.randperm(k)[: k // 50]] *= 60
    for same in (x.to(dtype), kit.transposed(x.to(dtype)), kit.sliced(x.to(dtype))):
        mine = round_rows(same, torch.int8, factor, config=replace(TINY, split=3))
        kept, columns, stands_out = truth(same.float().abs().amax(0), factor)
        assert mine.columns.tolist() == columns.tolist()
        kit.assert_same_bits(mine.apart, torch.where(stands_out, same[:, columns], 0))
        v = torch.where(kept == 0, 0, same.float() * kept)
        torch.testing.assert_close(mine.scale, v.abs().amax(1) / 127, rtol=1e-6, atol=0)
        error = mine.q * mine.scale[:, None] - v
        assert (error.abs() <= 0.501 * mine.scale[:, None]).all()


def test_apart_may_hold_inf_and_nan():
    """A column that counts gives both to the product; a row elsewhere is not touched."""
    x = torch.randn(20, 130)
    x[3, 5] = INF
    x[4, 5] = NAN
    mine = round_rows(x, torch.int8, None, config=TINY)
    assert mine.columns.tolist()[0] == 5
    kit.assert_same_bits(mine.apart[:, 0], x[:, 5])
    assert mine.scale.isfinite().all() and (mine.q[:, 5] == 0).all()


@DTYPES
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "a"),
    [(1, 2, 1), (33, 130, 2), (1024, 7, 7), (1025, 64, 16), (2500, 65, 16)],
    ids=str,
)
def test_weights_apart(n, k, a, transposed, dtype):
    data = torch.randint(-128, 128, (k, n) if transposed else (n, k), dtype=torch.int8)
    scale, columns = torch.rand(data.shape[0]) / 100, torch.randperm(k)[:a]
    exact = data.float() * scale[:, None]
    exact = (exact.t() if transposed else exact)[:, columns]
    for same in (data, kit.transposed(data)):
        found = weights_apart(same, scale, columns, dtype, transposed=transposed)
        assert found.dtype == dtype
        if dtype == torch.bfloat16:  # which the interpreter cuts off
            error = (found.float() - exact).abs()
            assert (error <= torch.finfo(dtype).eps * exact.abs()).all()
        else:
            kit.assert_same_bits(found, exact.to(dtype))


class TorchOperations(TorchDispatchMode):
    """Names of the operations that would launch something: views and allocations do not."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not function.is_view and "empty" not in name:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("transposed", [False, True])
def test_launches_of_a_product(transposed, monkeypatch):
    """Maxima, columns, rows, weights apart, product; for dX the weight is transposed besides."""
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.undo()  # guarded allocations fill
    launched = []
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *_, **__: launched.append(self.__name__)
    )
    packed = steps.Packed(QuantizedWeight.quantize(torch.randn(48, 128)), "int8", False, transposed)
    x = torch.randn(33, 48 if transposed else 128)
    with TorchOperations() as operations:
        steps.product(x, packed, None, CHIPS[INTERPRETER])
    assert operations.names == []
    assert sorted(set(launched) - {"_transpose"}) == [
        "_column_max", "_eight_bit", "_round_rows", "_set_apart", "_weights_apart"
    ]  # fmt: skip
    assert len(launched) == len(set(launched))


def test_one_program_reads_few_parts():
    """However many rows and columns: about what the chip's processors read at once."""
    chip = CHIPS["sm_90"]
    for m in (1, 512, 8192, 1 << 20):
        for k in (100, 4096, 14336, 53248, 1 << 18):
            split = tuning.config("round_rows_int8", Shape(m, k), chip).split
            assert split == 1 or split * k <= 1100 * 128
    assert tuning.config("round_rows_int8", Shape(8192, 4096), chip).split >= 8
