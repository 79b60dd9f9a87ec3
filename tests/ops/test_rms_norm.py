"""`rms_norm`: its formula in fp64, differentiated by torch, at any dtype, shape and path."""

import math
from functools import partial

import pytest
import torch

from artemis_kernels import Unavailable, explain, rms_norm
from artemis_kernels.core import native
from tests import kit
from tests.ops.rms_norm import EPS, assert_right, formula, gradients, operands
from tests.ops.rows import (
    BF16,
    DOUBLE,
    DTYPES,
    HALF,
    KERNELS,
    OPERATORS,
    PATHS,
    SINGLE,
    assert_rounded_once,
    impl_of,
)

# Rows and columns: none, one of each, short rows that share a program, past the passes' blocks and
# sums, past what registers hold in the backward and in the forward.
SHAPES = [
    (0, 5), (1, 1), (2, 2), (17, 33), (129, 33), (65, 1), (2, 1000), (7, 1025), (2, 5000),
    (3, 9000), (2, 17000),
]  # fmt: skip


@pytest.fixture(params=PATHS)
def norm(request, monkeypatch):
    """The operation by a path."""
    impl = impl_of(request.param, monkeypatch)
    return lambda x, weight, eps=EPS: rms_norm(x, weight, eps, impl=impl(x, weight))


@DTYPES
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_follows_the_formula(m, n, dtype, norm):
    given = operands(m, n, dtype)
    assert_right(gradients(norm, *given), *given)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e15])
def test_any_size_of_x(spread, eps, norm):
    """Where x is small eps is most of what the root is taken of."""
    given = operands(5, 300, SINGLE, spread)
    assert_right(gradients(norm, *given, eps), *given, eps)


def test_a_row_of_zeros_is_zero(norm):
    x, weight, dy = operands(3, 40)
    x[1] = 0
    got = gradients(norm, x, weight, dy)
    assert not got[0][1].any()
    assert_right(got, x, weight, dy)


def test_what_is_not_finite_stays_in_its_row(norm):
    x, weight, dy = operands(5, 1030)
    x[0, 3], x[2, 1029], x[4] = math.nan, math.inf, -math.inf
    y, dx, dw = gradients(norm, x, weight, dy)
    wanted, _, _ = gradients(formula, x.double(), weight.double(), dy.double())
    assert torch.equal(y.isnan(), wanted.isnan()) and y[0].isnan().all()
    assert dx[0].isnan().all() and dx[2].isnan().any() and dx[4].isnan().any() and dw.isnan().all()
    alone = gradients(norm, x[1::2], weight, dy[1::2])
    kit.assert_same_bits(y[1::2], alone[0])
    kit.assert_same_bits(dx[1::2], alone[1])


@pytest.mark.parametrize("layout", kit.LAYOUTS)
def test_any_layout(layout, norm):
    x, weight, dy = operands(9, 40)
    spread = weight.new_empty(80)[::2].copy_(weight)
    got = gradients(norm, layout(x), spread, layout(dy))
    assert_right(got, x, weight, dy)


def test_rows_and_gradients_that_lie_in_one_place(norm):
    """As `.expand` and `.sum()` make them: strides of 0."""
    x, weight, _ = operands(6, 50)
    x, dy = x[:1].expand(6, 50), torch.ones(()).expand(6, 50)
    assert_right(gradients(norm, x, weight, dy), x, weight, dy)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 0, 3)], ids=str)
def test_leading_dimensions(leading, norm):
    x, weight = torch.randn(*leading, 11), torch.randn(11)
    y = norm(x, weight)
    assert_rounded_once(y, formula(x.double(), weight.double()), y.double().abs())


@pytest.mark.parametrize(("of_x", "of_weight"), [(HALF, SINGLE), (SINGLE, BF16), (BF16, SINGLE)])
def test_a_weight_of_another_dtype(of_x, of_weight, norm):
    x, weight, dy = operands(5, 70)
    given = x.to(of_x), weight.to(of_weight), dy.to(of_x)
    assert_right(gradients(norm, *given), *given)


@DTYPES
@pytest.mark.parametrize("shape", [(5, 1030), (66, 40), (2, 17000)], ids=str)
def test_nothing_is_read_or_written_outside(shape, dtype, norm, guarded_allocations):
    x, weight, dy = (kit.offset(t) for t in operands(*shape, dtype))
    for found in gradients(norm, x, kit.offset(weight), dy):
        assert torch.isfinite(found).all()


@pytest.mark.skipif(not KERNELS, reason="needs triton")
@pytest.mark.parametrize(("m", "n"), [(7, 1500), (8, 1025), (4, 9000), (150, 20)])
def test_parts_of_several_rows(m, n, monkeypatch):
    """A GPU's dw is summed in parts of many rows, of which the last may have fewer."""
    from artemis_kernels.ops.rms_norm import kernels

    monkeypatch.setattr(kernels, "PARTS", 3 if m < 10 else 1)
    given = operands(m, n)
    assert_right(gradients(partial(rms_norm, impl="triton"), *given), *given)


@pytest.mark.parametrize("wanted", kit.subsets(["x", "weight"]), ids=str)
def test_gradients_of_what_asks_for_them(wanted, norm):
    x, weight, dy = operands(4, 60)
    tensors = {"x": x, "weight": weight}
    got, every = (kit.outcome(norm, tensors, names, dy) for names in (wanted, tensors))
    kit.assert_same_outcome(got, {name: every[name] for name in got})
    assert set(got) == {"y", *wanted}


def test_same_bits_whatever_the_threads(norm):
    given = operands(200, 333)
    first = gradients(norm, *given)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        second = gradients(norm, *given)
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(second, first, strict=True):
        kit.assert_same_bits(one, other)


def test_gradcheck():
    x, weight, _ = (t.requires_grad_() for t in operands(5, 7, DOUBLE))
    for impl in ("eager", "reference"):
        torch.autograd.gradcheck(partial(rms_norm, impl=impl), (x, weight))


def test_backward_twice_over_one_graph_and_no_second_derivative(norm):
    x, weight, dy = operands(5, 7)
    x.requires_grad_()
    y = norm(x, weight)
    first, second = (torch.autograd.grad(y, x, dy, retain_graph=True)[0] for _ in range(2))
    kit.assert_same_bits(second, first)
    with pytest.raises(Unavailable, match="^rms_norm: .*second derivative"):
        torch.autograd.grad(y, x, dy, create_graph=True)


@pytest.mark.parametrize("impl", OPERATORS)
@pytest.mark.parametrize("layout", [lambda t: t, kit.transposed, kit.sliced])
def test_opcheck(layout, impl):
    x, weight, dy = operands(4, 6)
    x, dy = layout(x), layout(dy)
    arguments = (x.requires_grad_(), weight.requires_grad_(), EPS, impl)
    torch.library.opcheck(torch.ops.artemis.rms_norm.default, arguments)
    for needs_weight in (False, True):
        torch.library.opcheck(
            torch.ops.artemis.rms_norm_backward.default,
            (dy, x.detach(), weight.detach(), EPS, impl, needs_weight),
        )


def test_compiles_into_one_graph():
    given = operands(4, 6)
    torch._dynamo.reset()
    compiled = torch.compile(rms_norm, backend="aot_eager", fullgraph=True)
    for one, other in zip(gradients(compiled, *given), gradients(rms_norm, *given), strict=True):
        kit.assert_same_bits(one, other)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_autocast_leaves_the_dtype_as_it_is(impl):
    x, weight, dy = operands(4, 6)
    with torch.autocast("cpu", BF16):
        got = gradients(partial(rms_norm, impl=impl), x, weight, dy)
    assert_right(got, x, weight, dy)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": [1.0]}, TypeError, "x must be a floating-point tensor, got list"),
        ({"x": torch.ones(2, 3).long()}, TypeError, "x must be .* got torch.int64"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have at least one dimension"),
        ({"x": torch.ones(2, 0)}, ValueError, r"x must have shape \(..., n\) with n > 0"),
        ({"weight": torch.ones(2)}, ValueError, r"weight must have shape \(3\), got \(2,\)"),
        ({"weight": None}, TypeError, "weight must be a floating-point tensor, got NoneType"),
        ({"weight": torch.ones(3, device="meta")}, ValueError, "weight is on meta, but x is on"),
        ({"eps": -1e-6}, ValueError, "eps must be a number of at least 0, got -1e-06"),
        ({"eps": math.nan}, ValueError, "eps must be .* got nan"),
        ({"eps": True}, ValueError, "eps must be .* got True"),
        ({"eps": "1e-6"}, ValueError, "eps must be .* got '1e-6'"),
        ({"impl": "cuda"}, ValueError, "impl must be"),
    ],
)
def test_refusals(change, error, words):
    arguments = {"x": torch.ones(2, 3), "weight": torch.ones(3)} | change
    with pytest.raises(error, match=f"^rms_norm: .*{words}"):
        rms_norm(**arguments)


def test_explain_names_the_path_of_the_call():
    x, weight, _ = operands(4, 6)
    there_is = native.library_for(x) is not None
    assert explain(rms_norm, x, weight).strategy == ("compiled" if there_is else "plain")
    assert explain("rms_norm", x.double(), weight).strategy == "plain"
    assert explain(rms_norm, x, weight, impl="reference").strategy == "composed"
    assert explain(rms_norm, x.bfloat16(), weight).cost.bytes == 2 * 2 * 24
    if KERNELS:
        assert explain(rms_norm, x, weight, impl="triton").strategy == "rows"
        with pytest.raises(Unavailable, match="float64"):
            explain(rms_norm, x.double(), weight, impl="triton")
