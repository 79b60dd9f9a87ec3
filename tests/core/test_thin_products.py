"""Thin products by the compiled pass: the formula in fp64 where it serves, nothing elsewhere."""

import itertools

import pytest
import torch

from artemis_kernels.core import thin_products
from tests import kit

from .bf16_oracle import BF16, F32, INT8, in_a_wider_one, in_columns, numbers, within

SHAPES = [
    (1, 1, 1), (7, 3, 5), (8, 65, 33), (100, 66, 16), (65, 129, 17), (9, 31, 257), (16, 800, 70),
    (20, 9, 300), (200, 35, 300), (13, 385, 70), (65, 259, 64),
]  # fmt: skip
KINDS = ("rounded", "added", "wide", "transposed")


needs_pass = pytest.mark.skipif(
    not thin_products.available(), reason="no bf16 dot products, or no compiler that knows them"
)


LAYOUTS = (in_columns, in_a_wider_one, kit.sliced)


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
    of_b = (in_columns, in_a_wider_one) if held[1] == INT8 else LAYOUTS
    served = 0
    for lay_a, lay_b in itertools.product((in_columns, in_a_wider_one), of_b):
        a, b = numbers(m, k, dtype=held[0]), numbers(k, n, dtype=held[1])
        start, bias = numbers(m, n) if kind == "added" else None, numbers(n, dtype=F32)
        bias = None if lay_a is in_columns else kit.sliced(bias)
        guarded = Guarded(m, n, kind)
        out = thin_products.multiply(
            lay_a(a), lay_b(b), guarded.out,
            start=None if start is None else in_a_wider_one(start), bias=bias, alpha=0.75,
        )  # fmt: skip
        assert guarded.kept
        if out is None:
            assert (guarded.inside == 77.0).all()
            continue
        served += 1
        a64, b64 = a.to(BF16).double(), b.to(BF16).double()
        wanted = 0.75 * (a64 @ b64)
        wanted = wanted if bias is None else wanted + bias.double()
        wanted = wanted if start is None else wanted + start.double()
        assert out is guarded.out and within(out, wanted, a64.abs() @ b64.abs())
    assert served >= (2 if m <= 128 else 1) * (len(of_b) if m >= 16 else 1)


@needs_pass
@pytest.mark.parametrize("by_columns", [False, True], ids=["by-rows", "by-columns"])
def test_an_output_of_its_own(by_columns):
    a, b = numbers(20, 300), numbers(300, 40)
    out = thin_products.multiply(a, b, dtype=F32, by_columns=by_columns)
    assert out.dtype == F32 and out.stride() == ((1, 20) if by_columns else (40, 1))
    assert within(out, a.double() @ b.double(), a.double().abs() @ b.double().abs())
    rounded = thin_products.multiply(a, b)
    kit.assert_same_bits(rounded, out.to(BF16))


@needs_pass
@pytest.mark.parametrize("lay", [torch.clone, in_a_wider_one], ids=["in-one-piece", "in-a-wider"])
def test_added_in_place(lay):
    s, g, y = numbers(37, 9), numbers(9, 50, dtype=F32), lay(numbers(37, 50))
    into = lay(y)
    assert thin_products.multiply(s, g, into, start=into) is into
    kit.assert_same_bits(into, thin_products.multiply(s, g, start=y))


@needs_pass
def test_numbers_too_small_to_be_normal_are_kept():
    """bf16's conversion by the processor takes them for zero: adding nothing would change them."""
    y = torch.full((20, 40), 2.0**-130, dtype=BF16)
    found = thin_products.multiply(numbers(20, 8), torch.zeros(8, 40, dtype=BF16), start=y)
    kit.assert_same_bits(found, y)


@needs_pass
def test_whole_numbers_are_exact():
    """Sums that fp32 holds: no term is lost or counted twice, at whatever place."""
    a, b = numbers(65, 129, dtype=INT8) // 8, numbers(129, 40, dtype=INT8) // 8
    out = thin_products.multiply(a, b, dtype=F32)
    assert torch.equal(out.long(), a.long() @ b.long())


@needs_pass
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(300, 70, 9), (9, 300, 400), (300, 9, 400), (40, 3, 5), (128, 130, 1100)],
    ids=str,
)
def test_same_bits_whatever_the_threads(m, k, n, monkeypatch):
    a, b = numbers(m, k), numbers(k, n)
    found = thin_products.multiply(a, b, dtype=F32)
    assert within(found, a.double() @ b.double(), a.double().abs() @ b.double().abs())
    for count in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        kit.assert_same_bits(thin_products.multiply(a, b, dtype=F32), found)


@needs_pass
@pytest.mark.parametrize("held", [*itertools.product((BF16, F32, INT8), repeat=2)], ids=str)
@pytest.mark.parametrize("lay", [torch.clone, in_columns], ids=["by-rows", "by-columns"])
def test_several_panels_of_one_thread(lay, held, monkeypatch):
    """However many threads there are: more than a block of k, by more columns than a panel has."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    a, b = numbers(20, 300, dtype=held[0]), numbers(300, 100, dtype=held[1])
    out = thin_products.multiply(a, lay(b), dtype=F32)
    a64, b64 = a.to(BF16).double(), b.to(BF16).double()
    assert within(out, a64 @ b64, a64.abs() @ b64.abs())


REFUSED = {
    "fp16": (numbers(40, 200).half(), numbers(200, 9)),
    "nothing-thin": (numbers(200, 200), numbers(200, 200)),
    "no-rows": (numbers(0, 8), numbers(8, 9)),
    "a-in-pieces": (kit.sliced(numbers(40, 20)), numbers(20, 9)),
    "a-copy-of-much": (in_columns(numbers(200, 300)), numbers(300, 9)),
    "a-weight-by-columns": (numbers(40, 200), in_columns(numbers(200, 300))),
    "few-rows": (numbers(15, 200), in_columns(numbers(200, 9))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_left_to_blas(name):
    assert thin_products.multiply(*REFUSED[name]) is None


@pytest.mark.parametrize(
    ("out", "start"),
    [
        (torch.zeros(40, 9, dtype=torch.float16), None),
        (kit.transposed(torch.zeros(40, 9, dtype=BF16)), None),
        (kit.sliced(torch.zeros(40, 9)), None),
        (torch.zeros(40, 9), numbers(40, 9)),
        (torch.zeros(40, 9, dtype=BF16), numbers(40, 9, dtype=F32)),
    ],
    ids=["fp16", "bf16-by-columns", "in-pieces", "wide-with-a-start", "start-in-fp32"],
)
def test_an_output_that_does_not_fit_is_left(out, start):
    assert thin_products.multiply(numbers(40, 20), numbers(20, 9), out, start=start) is None
    assert (out == 0).all()
