"""Products with a frozen bf16 weight by the compiled pass: the formula in fp64 where it serves."""

import itertools

import pytest
import torch

from artemis_kernels.core import bf16_products
from artemis_kernels.core.base import PlainBase
from artemis_kernels.core.products import LowRank
from tests import kit

from .bf16_oracle import BF16, F32, in_a_wider_one, in_columns, numbers, within

#: A tile and less, tiles and panels that are not full, several tasks, several chunks of a column.
SHAPES = [
    (8, 2, 1), (9, 34, 33), (16, 64, 32), (23, 66, 70), (40, 512, 257), (270, 130, 400),
    (11, 2050, 40), (17, 9000, 70), (300, 4098, 100),
]  # fmt: skip

needs_pass = pytest.mark.skipif(
    not bf16_products.available(), reason="no bf16 dot products, or no compiler that knows them"
)


def term(m: int, n: int, rank: int | None, dtype: torch.dtype) -> LowRank | None:
    return None if rank is None else LowRank(numbers(m, rank), numbers(n, rank, dtype=dtype), 0.75)


def formula(x, w, bias=None, into=None, plus=None) -> tuple[torch.Tensor, torch.Tensor]:
    """In fp64, and the magnitudes of all that is summed."""
    x, w = x.double(), w.double()
    y, terms = x @ w.t(), x.abs() @ w.abs().t()
    if plus is not None:
        s, g = plus.s.double(), plus.g.double()
        y, terms = y + plus.alpha * s @ g.t(), terms + s.abs() @ g.abs().t()
    for added in (bias, into):
        if added is not None:
            y, terms = y + added.double(), terms + added.double().abs()
    return y, terms


@needs_pass
@pytest.mark.parametrize("lay", [torch.clone, in_columns], ids=["by-output", "by-input"])
@pytest.mark.parametrize(("rank", "held"), [(None, F32), (0, F32), (1, BF16), (24, F32), (9, BF16)])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES, ids=str)
def test_the_formula(m, k, n, rank, held, lay):
    x, w, plus = numbers(m, k), numbers(n, k), term(m, n, rank, held)
    for bias, adds in itertools.product((None, numbers(n)), (False, True)):
        around = torch.full((m + 2, n), 77.0, dtype=BF16)
        into = around[1:-1]
        start = into.copy_(numbers(m, n)).clone() if adds else None
        y = bf16_products.multiply(x, lay(w), bias, into if adds else None, plus)
        wanted, terms = formula(x, w, bias, start, plus)
        assert y.dtype == BF16 and y.is_contiguous() and within(y, wanted, terms)
        assert (around[[0, -1]] == 77.0).all() and (y is into or not adds)


@needs_pass
def test_operands_of_any_strides():
    x, w, s, g = numbers(20, 66), numbers(50, 66), numbers(20, 5), numbers(50, 5)
    found = bf16_products.multiply(x, w, numbers(50).zero_(), None, LowRank(s, g, 1.0))
    for lay in (in_columns, in_a_wider_one, kit.sliced):
        bias = kit.sliced(torch.zeros(50))
        y = bf16_products.multiply(lay(x), w, bias, None, LowRank(lay(s), lay(g), 1.0))
        kit.assert_same_bits(y, found)


@needs_pass
def test_a_term_of_many_ranks_is_added_afterwards():
    x, w, plus = numbers(20, 66), numbers(50, 66), term(20, 50, 25, BF16)
    into = numbers(20, 50)
    start = into.clone()
    assert bf16_products.multiply(x, w, None, into, plus) is into
    wanted, terms = formula(x, w, None, start, plus)
    room = formula(x, w, None, start)[0].abs() / 256  # rounded before the term as well
    assert ((into.double() - wanted).abs() <= wanted.abs() / 256 + room + 1e-6 * terms).all()


@needs_pass
@pytest.mark.parametrize("lay", [torch.clone, in_columns], ids=["by-output", "by-input"])
def test_whole_numbers_are_exact(lay):
    """Sums that bf16 holds: no term is lost or counted twice, at whatever place."""
    x, w = torch.zeros(61, 4500), torch.zeros(97, 4500)
    for row, column in enumerate(torch.randperm(4500)[:61]):
        x[row, column], w[:, column] = 1.0, torch.arange(97) + row
    y = bf16_products.multiply(x.to(BF16), lay(w.to(BF16)))
    assert torch.equal(y.double(), x.double() @ w.double().t())


@needs_pass
@pytest.mark.parametrize("lay", [torch.clone, in_columns], ids=["by-output", "by-input"])
def test_same_bits_whatever_the_threads(lay, monkeypatch):
    x, w, plus = numbers(70, 2500), lay(numbers(300, 2500)), term(70, 300, 4, F32)
    found = bf16_products.multiply(x, w, plus=plus)
    for count in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        kit.assert_same_bits(bf16_products.multiply(x, w, plus=plus), found)


@needs_pass
def test_what_is_not_finite_stays_in_its_place():
    x, w = numbers(20, 64), numbers(40, 64).abs()
    x[3, 5], x[12, 9] = torch.nan, torch.inf
    y = bf16_products.multiply(x, w)
    assert y[3].isnan().all() and y[12].isinf().all()
    rest = [i for i in range(20) if i not in (3, 12)]
    assert y[rest].isfinite().all()


REFUSED = {
    "fp32": (numbers(40, 20, dtype=F32), numbers(9, 20, dtype=F32)),
    "two-dtypes": (numbers(40, 20), numbers(9, 20, dtype=F32)),
    "an-odd-sum": (numbers(40, 21), numbers(9, 21)),
    "few-rows": (numbers(7, 20), numbers(9, 20)),
    "no-inputs": (numbers(40, 0), numbers(9, 0)),
    "no-outputs": (numbers(40, 20), numbers(0, 20)),
    "a-weight-in-pieces": (numbers(40, 20), kit.sliced(numbers(9, 20))),
    "a-weight-in-a-wider-one": (numbers(40, 20), in_a_wider_one(numbers(9, 20))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_left_to_blas(name):
    assert bf16_products.multiply(*REFUSED[name]) is None


def test_an_output_that_does_not_fit_is_left():
    into = in_columns(torch.zeros(40, 9, dtype=BF16))
    assert bf16_products.multiply(numbers(40, 20), numbers(9, 20), None, into) is None
    assert (into == 0).all()


@pytest.mark.parametrize("k", [64, 65], ids=["our-pass", "blas"])
def test_a_base_multiplies_either_way(k):
    """As layers call it: y with a bias and a term, dX added to another's, both of one weight."""
    weight, x, dy, into = numbers(40, k), numbers(20, k), numbers(20, 40), numbers(20, k)
    bias, of_y, of_x = numbers(40), term(20, 40, 3, F32), term(20, k, 3, F32)
    start = into.clone()
    for found, (wanted, terms) in (
        (PlainBase(weight).product(x, bias, None, of_y), formula(x, weight, bias, None, of_y)),
        (
            PlainBase(weight).input_gradient(dy, into, of_x),
            formula(dy, weight.t(), None, start, of_x),
        ),
    ):
        assert ((found.double() - wanted).abs() <= terms / 64).all()
