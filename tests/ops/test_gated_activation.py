"""`gated_activation`: its formulas in fp64, differentiated by torch, at any dtype and path."""

import math
from functools import partial

import pytest
import torch

from artemis_kernels import Unavailable, explain, gated_activation
from artemis_kernels.core import native
from tests import kit
from tests.ops.gated_activation import assert_right, gradients, operands
from tests.ops.rows import (
    BF16,
    DOUBLE,
    DTYPES,
    HALF,
    KERNELS,
    OPERATORS,
    PATHS,
    SINGLE,
    impl_of,
)

# Below, at and one past what a pass or a program takes at a time; nothing; one number.
SHAPES = [(), (0, 3), (1,), (17, 33), (2, 512), (2049,), (129, 33), (3, 1000), (2, 4, 600)]
EACH = pytest.mark.parametrize("activation", kit.ACTIVATIONS)


@pytest.fixture(params=PATHS)
def gated(request, monkeypatch):
    """The operation by a path."""
    impl = impl_of(request.param, monkeypatch)
    return lambda gate, up, activation: gated_activation(gate, up, activation, impl=impl(gate))


@DTYPES
@EACH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_follows_the_formula(shape, activation, dtype, gated):
    given = operands(*shape, dtype=dtype)
    assert_right(gradients(gated, *given, activation), *given, activation)


@DTYPES
@EACH
def test_gates_wide_open_and_shut(activation, dtype, gated):
    gate = torch.tensor([-3e4, -300.0, -88.7, -20.0, -1e-6, 0.0, 1e-6, 20.0, 88.7, 300.0, 3e4])
    up, dy = torch.full((11,), 0.5), torch.ones(11)
    given = gate.to(dtype), up.to(dtype), dy.to(dtype)
    assert_right(gradients(gated, *given, activation), *given, activation)


@EACH
def test_what_is_not_finite_stays_where_it_is(activation, gated):
    gate, up, dy = operands(3, 700)
    gate[0, 5], gate[1, 5], up[2, 5], dy[2, 699] = math.nan, math.inf, math.nan, math.inf
    y, dgate, dup = gradients(gated, gate, up, dy, activation)
    assert y[0, 5].isnan() and dup[0, 5].isnan() and y[2, 5].isnan()
    assert dgate[0, 5].isnan() or activation in ("relu", "identity")  # whose slopes are numbers
    assert not y[1, 5].isfinite()  # gelu of infinity is nan in torch
    assert not dgate[2, 699].isfinite() or activation == "relu"
    finite = torch.isfinite(gate) & torch.isfinite(up) & torch.isfinite(dy)
    rest = [t[finite] for t in (gate, up, dy)]
    assert_right([t[finite] for t in (y, dgate, dup)], *rest, activation)


@pytest.mark.parametrize("layout", kit.LAYOUTS)
def test_any_layout(layout, gated):
    gate, up, dy = operands(9, 40)
    assert_right(gradients(gated, layout(gate), layout(up), layout(dy)), gate, up, dy)
    assert_right(gradients(gated, layout(gate), up, dy), gate, up, dy)


def test_halves_of_one_product_and_a_gradient_that_lies_in_one_place(gated):
    gate, up = torch.randn(6, 100).chunk(2, -1)
    dy = torch.ones(()).expand(6, 50)
    assert_right(gradients(gated, gate, up, dy), gate, up, dy)


@DTYPES
@pytest.mark.parametrize("shape", [(7,), (3, 700)], ids=str)
def test_nothing_is_read_or_written_outside(shape, dtype, gated, guarded_allocations):
    given = [kit.offset(t) for t in operands(*shape, dtype=dtype)]
    for found in gradients(gated, *given):
        assert torch.isfinite(found).all()


@pytest.mark.parametrize("wanted", kit.subsets(["gate", "up"]), ids=str)
def test_gradients_of_what_asks_for_them(wanted, gated):
    gate, up, dy = operands(4, 60)
    tensors, run = {"gate": gate, "up": up}, partial(gated, activation="gelu")
    got, every = (kit.outcome(run, tensors, names, dy) for names in (wanted, tensors))
    kit.assert_same_outcome(got, {name: every[name] for name in got})
    assert set(got) == {"y", *wanted}


@EACH
def test_gradcheck(activation):
    gate, up, _ = (t.requires_grad_() for t in operands(5, 7, dtype=DOUBLE))
    for impl in ("eager", "reference"):
        run = partial(gated_activation, activation=activation, impl=impl)
        torch.autograd.gradcheck(run, (gate, up))


def test_backward_twice_over_one_graph_and_no_second_derivative(gated):
    gate, up, dy = operands(5, 7)
    gate.requires_grad_()
    y = gated(gate, up, "silu")
    first, second = (torch.autograd.grad(y, gate, dy, retain_graph=True)[0] for _ in range(2))
    kit.assert_same_bits(second, first)
    with pytest.raises(Unavailable, match="^gated_activation: .*second derivative"):
        torch.autograd.grad(y, gate, dy, create_graph=True)


@pytest.mark.parametrize("impl", OPERATORS)
@pytest.mark.parametrize("dtype", [SINGLE, HALF, DOUBLE], ids=str)
@pytest.mark.parametrize("layout", [lambda t: t, kit.transposed, kit.sliced])
def test_opcheck(layout, dtype, impl):
    if (impl, dtype) == ("triton", DOUBLE):
        pytest.skip("the kernels take no float64")
    gate, up, dy = (layout(t) for t in operands(4, 6, dtype=dtype))
    arguments = (gate.requires_grad_(), up.requires_grad_(), "silu", impl)
    torch.library.opcheck(torch.ops.artemis.gated_activation.default, arguments)
    torch.library.opcheck(
        torch.ops.artemis.gated_activation_backward.default,
        (dy, gate.detach(), up.detach(), "silu", impl),
    )


def test_compiles_into_one_graph():
    given = operands(4, 6)
    torch._dynamo.reset()
    compiled = torch.compile(gated_activation, backend="aot_eager", fullgraph=True)
    plain = gradients(gated_activation, *given)
    for one, other in zip(gradients(compiled, *given), plain, strict=True):
        kit.assert_same_bits(one, other)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_autocast_leaves_the_dtype_as_it_is(impl):
    given = operands(4, 6)
    with torch.autocast("cpu", BF16):
        got = gradients(partial(gated_activation, impl=impl), *given)
    assert_right(got, *given)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"gate": [1.0]}, TypeError, "gate must be a floating-point tensor, got list"),
        ({"up": torch.ones(2, 3).long()}, TypeError, "up must be .* got torch.int64"),
        ({"up": torch.ones(3)}, ValueError, r"gate's shape \(2, 3\), got \(3,\)"),
        ({"up": torch.ones(2, 3).half()}, TypeError, "up is torch.float16, but gate is"),
        ({"up": torch.ones(2, 3, device="meta")}, ValueError, "up is on meta, but gate is on cpu"),
        ({"activation": "swish"}, ValueError, "activation must be one of .* got 'swish'"),
        ({"impl": "cuda"}, ValueError, "impl must be"),
    ],
)
def test_refusals(change, error, words):
    arguments = {"gate": torch.ones(2, 3), "up": torch.ones(2, 3)} | change
    with pytest.raises(error, match=f"^gated_activation: .*{words}"):
        gated_activation(**arguments)


def test_explain_names_the_path_of_the_call():
    gate, up, _ = operands(4, 6)
    there_is = native.library_for(gate) is not None
    assert explain(gated_activation, gate, up).strategy == ("compiled" if there_is else "plain")
    assert explain("gated_activation", gate.double(), up.double()).strategy == "plain"
    assert explain(gated_activation, gate=gate, up=up, impl="reference").strategy == "composed"
    assert explain(gated_activation, gate, up).cost.bytes == 3 * 4 * 24
    if KERNELS:
        assert explain(gated_activation, gate, up, impl="triton").strategy == "rows"
        with pytest.raises(Unavailable, match="float64"):
            explain(gated_activation, gate.double(), up.double(), impl="triton")
