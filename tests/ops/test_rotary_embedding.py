"""`rotary_embedding`: a matrix for each position in fp64, at any dtype, shape, layout and path."""

import math
from functools import partial

import pytest
import torch

from artemis_kernels import Unavailable, explain, rotary_embedding
from artemis_kernels.core import native
from tests import kit
from tests.ops.rotary_embedding import assert_right, gradients, operands
from tests.ops.rows import (
    BF16,
    DOUBLE,
    DTYPES,
    HALF,
    KERNELS,
    OPERATORS,
    PATHS,
    impl_of,
)

# Batch, heads of q, of k, positions, head: one of each, one pair, halves of 24, 32, 40 and 64,
# one head past what a program takes; no heads, batch, positions or columns.
SHAPES = [
    (1, 1, 1, 1, 2), (2, 3, 1, 17, 48), (1, 4, 4, 2, 64), (2, 27, 3, 3, 80), (1, 17, 16, 2, 128),
    (2, 2, 1, 33, 2), (2, 1, 3, 2, 2048), (1, 33, 65, 1, 4), (2, 0, 3, 4, 8), (0, 2, 1, 3, 8),
    (2, 2, 1, 0, 8), (1, 2, 2, 3, 0),
]  # fmt: skip
SHAPE = (2, 5, 3, 7, 48)  # where it is not the question


@pytest.fixture(params=PATHS)
def rotary(request, monkeypatch):
    """The operation by a path."""
    impl = impl_of(request.param, monkeypatch)
    return lambda q, k, cos, sin: rotary_embedding(q, k, cos, sin, impl=impl(q))


@DTYPES
@pytest.mark.parametrize("tables", [None, 1], ids=["for each", "for all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_follows_the_formula(shape, tables, dtype, rotary):
    given = operands(*shape, dtype, tables)
    got = gradients(rotary, *given)
    assert_right(got, *given)
    assert got[0].is_contiguous() and got[1].is_contiguous()


@pytest.mark.parametrize("path", PATHS)
def test_gradients_lie_as_the_projections_write(path, monkeypatch):
    """[B, T, H, D] in memory: what comes before is a product of [B, T, H·D]."""
    q, k, cos, sin, dq, dk = operands(*SHAPE)
    impl = impl_of(path, monkeypatch)(q)
    for gradient in torch.ops.artemis.rotary_embedding_backward(dq, dk, cos, sin, impl):
        assert gradient.transpose(1, 2).is_contiguous()


def test_pairs_turn_by_angles(rotary):
    """With a true table: a multiplication by e^(i·angle) of x₁ + i·x₂, which keeps lengths."""
    q, k, *_ = operands(*SHAPE)
    angles = torch.arange(7.0)[:, None] * 10000 ** -(torch.arange(24) / 24)
    table = torch.cat((angles, angles), -1)[None]
    for x, y in zip((q, k), rotary(q, k, table.cos(), table.sin()), strict=True):
        turned = torch.complex(*x.double().chunk(2, -1)) * torch.exp(1j * angles.double())
        torch.testing.assert_close(
            y.double(), torch.cat((turned.real, turned.imag), -1), rtol=1e-5, atol=1e-5
        )


def as_projected(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def within_one_product(x: torch.Tensor) -> torch.Tensor:
    """As a fused q, k and v leave it: every third of a row."""
    b, h, t, d = x.shape
    wide = x.new_full((b, t, 3, h, d), math.nan)
    wide[:, :, 1] = x.transpose(1, 2)
    return wide[:, :, 1].transpose(1, 2)


@pytest.mark.parametrize("layout", [*kit.LAYOUTS, as_projected, within_one_product])
def test_any_layout(layout, rotary):
    q, k, cos, sin, dq, dk = operands(*SHAPE)
    laid = gradients(rotary, layout(q), layout(k), cos, sin, layout(dq), layout(dk))
    assert_right(laid, q, k, cos, sin, dq, dk)
    tables = kit.sliced(cos), kit.transposed(sin)
    kit.assert_same_bits(rotary(q, layout(k), *tables)[1], laid[1])


def test_what_lies_in_one_place(rotary):
    """Heads that are one, as a shared key's; a table for all; the gradient of a sum."""
    q, k, cos, sin, *_ = operands(*SHAPE, tables=1)
    k, one = k[:, :1].expand(-1, 3, -1, -1), torch.ones(())
    given = q, k, cos.expand(2, 7, 48), sin.expand(2, 7, 48), one.expand(q.shape), one.expand(3)
    given = *given[:5], one.expand(k.shape)
    assert_right(gradients(rotary, *given), *given)


def test_tables_of_another_dtype(rotary):
    q, k, cos, sin, dq, dk = operands(*SHAPE, HALF)
    given = q, k, cos.float(), sin.float(), dq, dk
    assert_right(gradients(rotary, *given), *given)


@pytest.mark.parametrize("size", [1e-6, 1e30])
def test_large_and_small_numbers(size, rotary):
    q, k, cos, sin, dq, dk = operands(*SHAPE)
    given = size * q, size * k, cos, sin, size * dq, size * dk
    assert_right(gradients(rotary, *given), *given)


def test_what_is_not_finite_stays_in_its_pair(rotary):
    q, k, cos, sin, dq, dk = operands(*SHAPE)
    given = q, k, cos, sin, dq, dk
    clean = gradients(rotary, *given)
    spoilt = [t.clone() for t in given]
    for tensor, number in ((spoilt[0], math.nan), (spoilt[5], math.inf)):
        tensor[1, 2, 6, 3] = number
    for index, (one, was) in enumerate(zip(gradients(rotary, *spoilt), clean, strict=True)):
        hit = torch.zeros_like(one, dtype=torch.bool)
        if index in (0, 3):
            hit[1, 2, 6, [3, 27]] = True
        assert torch.equal(~one.isfinite(), hit)
        kit.assert_same_bits(one[~hit], was[~hit])


@DTYPES
@pytest.mark.parametrize("shape", [(2, 5, 3, 3, 48), (1, 9, 1, 2, 128)], ids=str)
def test_nothing_is_read_or_written_outside(shape, dtype, rotary, guarded_allocations):
    given = [kit.offset(t) for t in operands(*shape, dtype)]
    for found in gradients(rotary, *given):
        assert torch.isfinite(found).all()


@pytest.mark.parametrize("wanted", [("q",), ("k",), ("q", "k")], ids=str)
def test_gradients_of_what_asks_for_them(wanted, rotary):
    q, k, cos, sin, dq, dk = operands(*SHAPE)
    every = dict(zip("qk", gradients(rotary, q, k, cos, sin, dq, dk)[2:], strict=True))
    leaves = {"q": q, "k": k}
    for name in wanted:
        leaves[name].requires_grad_()
    torch.autograd.backward(rotary(q, k, cos, sin), (dq, dk))
    for name, leaf in leaves.items():
        if name in wanted:
            kit.assert_same_bits(leaf.grad, every[name])
        else:
            assert leaf.grad is None


def test_one_result_of_which_nothing_is_used(rotary):
    q, k, cos, sin, dq, dk = operands(*SHAPE)
    every = gradients(rotary, q, k, cos, sin, dq, dk)
    q.requires_grad_(), k.requires_grad_()
    rotary(q, k, cos, sin)[0].backward(dq)
    kit.assert_same_bits(q.grad, every[2])
    assert k.grad is None or not k.grad.any()


def test_gradcheck():
    q, k, cos, sin, *_ = operands(2, 2, 1, 3, 4, DOUBLE)
    q.requires_grad_(), k.requires_grad_()
    for impl in ("eager", "reference"):
        torch.autograd.gradcheck(partial(rotary_embedding, impl=impl), (q, k, cos, sin))


def test_tables_that_learn_take_the_reference():
    given = [t.requires_grad_() for t in operands(2, 2, 1, 3, 4, DOUBLE)[:4]]
    assert explain(rotary_embedding, *given).impl == "reference"
    torch.autograd.gradcheck(rotary_embedding, given)
    with pytest.raises(Unavailable, match="takes frozen cos and sin"):
        rotary_embedding(*given, impl="eager")
    with torch.no_grad():
        assert explain(rotary_embedding, *given).impl == "eager"


def test_backward_twice_over_one_graph_and_no_second_derivative(rotary):
    q, k, cos, sin, dq, _ = operands(*SHAPE)
    q.requires_grad_()
    y = rotary(q, k, cos, sin)[0]
    first, second = (torch.autograd.grad(y, q, dq, retain_graph=True)[0] for _ in range(2))
    kit.assert_same_bits(second, first)
    with pytest.raises(Unavailable, match="^rotary_embedding: .*second derivative"):
        torch.autograd.grad(y, q, dq, create_graph=True)


@pytest.mark.parametrize("impl", OPERATORS)
@pytest.mark.parametrize("layout", [lambda t: t, as_projected, kit.sliced])
def test_opcheck(layout, impl):
    q, k, cos, sin, dq, dk = operands(2, 3, 2, 4, 6)
    q, k, dq, dk = (layout(t) for t in (q, k, dq, dk))
    torch.library.opcheck(
        torch.ops.artemis.rotary_embedding_backward.default, (dq, dk, cos, sin, impl)
    )
    arguments = (q.requires_grad_(), k.requires_grad_(), cos, sin, impl)
    torch.library.opcheck(torch.ops.artemis.rotary_embedding.default, arguments)


def test_compiles_into_one_graph():
    given = operands(*SHAPE)
    torch._dynamo.reset()
    compiled = torch.compile(rotary_embedding, backend="aot_eager", fullgraph=True)
    plain = gradients(rotary_embedding, *given)
    for one, other in zip(gradients(compiled, *given), plain, strict=True):
        kit.assert_same_bits(one, other)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_autocast_leaves_the_dtype_as_it_is(impl):
    given = operands(*SHAPE)
    with torch.autocast("cpu", BF16):
        got = gradients(partial(rotary_embedding, impl=impl), *given)
    assert_right(got, *given)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": None}, TypeError, "q must be a floating-point tensor, got NoneType"),
        ({"q": torch.ones(2, 4, 6)}, ValueError, r"q must have shape \(any, any, any, any\)"),
        ({"q": torch.ones(2, 3, 4, 5)}, ValueError, r"k must have shape \(2, any, 4, 5\)"),
        ({"k": torch.ones(2, 1, 3, 6)}, ValueError, r"k must have shape \(2, any, 4, 6\)"),
        ({"k": torch.ones(2, 1, 4, 6).half()}, TypeError, "k is torch.float16, but q is"),
        ({"k": torch.ones(2, 1, 4, 6, device="meta")}, ValueError, "k is on meta, but q is on"),
        ({"cos": torch.ones(4, 6)}, ValueError, r"cos must have shape \(any, 4, 6\)"),
        ({"cos": torch.ones(3, 4, 6)}, ValueError, r"cos must have shape \(1 or 2, 4, 6\)"),
        ({"sin": torch.ones(1, 4, 6)}, ValueError, r"sin must have shape \(2, 4, 6\)"),
        ({"sin": torch.ones(2, 4, 6).long()}, TypeError, "sin must be .* got torch.int64"),
        ({"impl": "cuda"}, ValueError, "impl must be"),
    ],
)
def test_refusals(change, error, words):
    q, k, cos, sin, *_ = operands(2, 3, 1, 4, 6)
    with pytest.raises(error, match=f"^rotary_embedding: .*{words}"):
        rotary_embedding(**{"q": q, "k": k, "cos": cos, "sin": sin} | change)


def test_heads_of_odd_width_have_no_halves():
    q, k, cos, sin, *_ = operands(2, 3, 1, 4, 6)
    odd = [t[..., :5] for t in (q, k, cos, sin)]
    with pytest.raises(ValueError, match=r"q must have an even last dimension, got \(2, 3, 4, 5\)"):
        rotary_embedding(*odd)


def test_explain_names_the_path_of_the_call():
    given = operands(*SHAPE)[:4]
    there_is = native.library_for(given[0]) is not None
    assert explain(rotary_embedding, *given).strategy == ("compiled" if there_is else "plain")
    doubles = [t.double() for t in given]
    assert explain("rotary_embedding", *doubles).strategy == "plain"
    assert explain(rotary_embedding, *given, impl="reference").strategy == "composed"
    assert explain(rotary_embedding, *given).cost.bytes == 2 * 4 * 2 * 8 * 7 * 48
    if KERNELS:
        assert explain(rotary_embedding, *given, impl="triton").strategy == "rows"
        with pytest.raises(Unavailable, match="float64"):
            explain(rotary_embedding, *doubles, impl="triton")
