"""Thin products by the compiled pass: the formula in fp64 where it serves, nothing elsewhere."""

import itertools
import math

import pytest
import torch

from artemis_kernels.core import native, thin_products
from artemis_kernels.core.device import has_bf16_dots
from tests import kit

BF16, F32, INT8 = torch.bfloat16, torch.float32, torch.int8
SHAPES = [
    (1, 1, 1), (7, 3, 5), (8, 65, 33), (100, 66, 16), (65, 129, 17), (9, 31, 257), (16, 800, 70),
]  # fmt: skip
KINDS = ("rounded", "added", "wide", "transposed")


def _has_pass() -> bool:
    handle = native.library().handle if has_bf16_dots() else None
    return handle is not None and native.has(handle, "thin_product")


needs_pass = pytest.mark.skipif(not _has_pass(), reason="no bf16 dot products here")


def numbers(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    if dtype == INT8:
        return torch.randint(-128, 128, shape, dtype=dtype)
    return torch.randn(shape).to(dtype)


def in_columns(t: torch.Tensor) -> torch.Tensor:
    return t.t().contiguous().t()


def in_a_wider_one(t: torch.Tensor) -> torch.Tensor:
    """Rows of stride 1, with nan (or what int8 has for it) right behind each."""
    filler = -128 if t.dtype == INT8 else math.nan
    wide = t.new_full((t.shape[0], t.shape[1] + 3), filler)
    wide[:, : t.shape[1]] = t
    return wide[:, : t.shape[1]]


class Guarded:
    """An output in the midst of sentinels; `kept` says whether they still are."""

    def __init__(self, m: int, n: int, kind: str):
        rows, columns = (n, m) if kind == "transposed" else (m, n)
        dtype = BF16 if kind in ("rounded", "added") else F32
        self.whole = torch.full((rows + 2, columns + 2), 77.0, dtype=dtype)
        self.inside = self.whole[1:-1, 1:-1]
        self.out = self.inside.t() if kind == "transposed" else self.inside

    @property
    def kept(self) -> bool:
        without = self.whole.clone()
        without[1:-1, 1:-1] = 77.0
        return bool((without == 77.0).all())


@needs_pass
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held", [*itertools.product((BF16, F32, INT8), repeat=2)], ids=str)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES, ids=str)
def test_the_formula(m, k, n, held, kind):
    of_a = (in_columns, in_a_wider_one)
    of_b = (in_columns, in_a_wider_one) if held[1] == INT8 else (*of_a, kit.sliced)
    for lay_a, lay_b in itertools.product(of_a, of_b):
        a, b = numbers(m, k, dtype=held[0]), numbers(k, n, dtype=held[1])
        start, bias = numbers(m, n) if kind == "added" else None, numbers(n, dtype=F32)
        guarded = Guarded(m, n, kind)
        assert thin_products.multiply(
            lay_a(a), lay_b(b), guarded.out, start=start, bias=bias, alpha=0.75
        )
        a64, b64 = a.to(BF16).double(), b.to(BF16).double()
        wanted = 0.75 * (a64 @ b64) + bias.double()
        wanted = wanted if start is None else wanted + start.double()
        room = 1e-6 * (1 + a64.abs() @ b64.abs())
        room = room + wanted.abs() / 256 if guarded.out.dtype == BF16 else room
        assert ((guarded.out.double() - wanted).abs() <= room).all()
        assert guarded.kept


@needs_pass
def test_added_in_place():
    s, g, y = numbers(37, 9), numbers(9, 50, dtype=F32), numbers(37, 50)
    into = y.clone()
    assert thin_products.multiply(s, g, into, start=into)
    assert thin_products.multiply(s, g, out := torch.empty_like(y), start=y)
    kit.assert_same_bits(into, out)


@needs_pass
def test_whole_numbers_are_exact():
    """Sums that fp32 holds: no term is lost or counted twice, at whatever place."""
    a, b = numbers(65, 129, dtype=INT8) // 8, numbers(129, 40, dtype=INT8) // 8
    assert thin_products.multiply(a, b, out := torch.empty(65, 40))
    assert torch.equal(out.long(), a.long() @ b.long())


@needs_pass
@pytest.mark.parametrize(("m", "k", "n"), [(300, 70, 9), (9, 300, 400), (300, 9, 400)], ids=str)
def test_same_bits_whatever_the_threads(m, k, n):
    a, b, results, threads = numbers(m, k), numbers(k, n), [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(torch.empty(m, n))
        assert thin_products.multiply(a, b, results[-1])
    torch.set_num_threads(threads)
    kit.assert_same_bits(results[1], results[0])
    kit.assert_same_bits(results[2], results[0])


@pytest.mark.parametrize(
    ("a", "b", "out"),
    [
        (numbers(9, 200), numbers(200, 9), torch.zeros(9, 9, dtype=torch.float16)),
        (numbers(9, 200).half(), numbers(200, 9), torch.zeros(9, 9)),
        (numbers(200, 200), numbers(200, 200), torch.zeros(200, 200)),
        (numbers(0, 8), numbers(8, 9), torch.zeros(0, 9)),
        (kit.sliced(numbers(9, 20)), numbers(20, 9), torch.zeros(9, 9)),
        (numbers(9, 20), numbers(20, 9), kit.transposed(torch.zeros(9, 9, dtype=BF16))),
    ],
    ids=["fp16-out", "fp16", "nothing-thin", "no-rows", "a-in-pieces", "bf16-by-columns"],
)
def test_what_is_not_served_is_left(a, b, out):
    assert not thin_products.multiply(a, b, out)
    assert (out == 0).all()


def test_a_start_for_an_output_in_fp32_is_not_left_out():
    out, start = torch.zeros(9, 9), numbers(9, 9)
    assert not thin_products.multiply(numbers(9, 20), numbers(20, 9), out, start=start)
