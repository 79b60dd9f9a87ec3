"""`attention`: torch's own in fp64 is the truth, at any dtype, shape, mask and path."""

import math

import pytest
import torch
from torch.nn import functional

from artemis_kernels import Unavailable, attention, explain
from artemis_kernels.core import native
from artemis_kernels.ops.attention import eager
from artemis_kernels.ops.attention.eager import QUERIES
from tests import kit

SINGLE, BF16, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
PATHS = ["whole", "compiled", "plain"]
#: Of a norm of errors over the norm of what is right: scores and results are rounded.
ALLOWED = {SINGLE: 1e-6, BF16: 8e-3, HALF: 1e-3, DOUBLE: 1e-13}
# B, H, G, T, S, D, E: heads alone and shared, one row, a block, one past it, several blocks.
CAUSAL = [
    (2, 4, 2, 5, 5, 8, 8),
    (1, 2, 2, 1, 1, 4, 4),
    (1, 2, 1, QUERIES, QUERIES, 16, 16),
    (2, 6, 2, QUERIES + 1, QUERIES + 1, 8, 12),
    (1, 4, 1, 2 * QUERIES + 44, 2 * QUERIES + 44, 16, 16),
    (1, 2, 1, 70, 70, 66, 34),
    (1, 2, 2, 11, 11, 128, 64),
    (9, 8, 4, 12, 12, 48, 40),  # many heads, which threads claim by fours
]
OTHER = [
    (1, 2, 1, 3, 40, 8, 8),
    (2, 4, 4, QUERIES + 3, 7, 5, 3),
    (3, 2, 2, 1, 9, 4, 4),
    (2, 4, 2, QUERIES + 3, 77, 40, 34),
]
# As in decoding: queries of heads that share keys by fours and what is left, small and large heads.
FEW = [
    (2, 6, 2, 1, 50, 40, 78),
    (1, 3, 1, 5, 33, 66, 130),
    (2, 7, 1, 1, 100, 128, 64),
    (1, 2, 2, 1, 1, 4, 2),
    (2, 4, 2, 7, 200, 34, 66),
]


def take(path, monkeypatch):
    """Let only `path`, or one before it, be taken."""
    if path != "whole":
        monkeypatch.setattr(eager, "whole_pass", lambda q, k, v: None)
    if path == "plain":
        monkeypatch.setattr(native, "library_for", lambda x: None)


@pytest.fixture(params=PATHS)
def along(request, monkeypatch):
    """The operation by a path."""
    take(request.param, monkeypatch)

    def run(q, k, v, **options):
        if request.param == "compiled" and native.library_for(q) is None:
            pytest.skip("there is no compiled pass for these")
        if request.param == "whole" and eager.whole_pass(q, k, v) is None:
            pytest.skip("these are not for one pass")
        return attention(q, k, v, impl="eager", **options)

    return run


def operands(shape, dtype=SINGLE):
    B, H, G, T, S, D, E = shape
    sizes = (B, H, T, D), (B, G, S, D), (B, G, S, E)
    return tuple(torch.randn(size).to(dtype) for size in sizes)


def outcome(run, tensors, dy):
    """Y and the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    y = run(*leaves)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def truth(tensors, dy, **options):
    """The same in fp64 by torch."""
    share = tensors[0].shape[1] // tensors[1].shape[1]

    def run(q, k, v):
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        return functional.scaled_dot_product_attention(q, k, v, **options)

    return outcome(run, [x.double() for x in tensors], dy.double())


def assert_close(found, wanted, dtype):
    for name, x, right in zip(("y", "dq", "dk", "dv"), found, wanted, strict=True):
        assert x.dtype == dtype and x.shape == right.shape, name
        error = (x.double() - right).norm()
        assert error <= ALLOWED[dtype] * right.norm() + 1e-30, f"{name}: {error:.2g}"


def a_mask(shape, batches):
    """Which keys are seen, two thirds of them, and the first always."""
    _, _, _, T, S, _, _ = shape
    mask = torch.rand(batches, 1, T, S) < 0.66
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("dtype", [SINGLE, BF16, HALF, DOUBLE], ids=str)
@pytest.mark.parametrize("shape", CAUSAL, ids=str)
def test_causal_follows_torch_in_double(shape, dtype, along):
    tensors, dy = operands(shape, dtype), torch.randn(*shape[:2], shape[3], shape[6])
    found = outcome(lambda *x: along(*x, causal=True), tensors, dy)
    assert_close(found, truth(tensors, dy, is_causal=True), dtype)


@pytest.mark.parametrize("dtype", [SINGLE, BF16], ids=str)
@pytest.mark.parametrize("shape", OTHER + CAUSAL[3:] + FEW, ids=str)
@pytest.mark.parametrize("masks", [0, 1, None], ids=["no mask", "one mask", "a mask each"])
def test_masks_follow_torch_in_double(shape, masks, dtype, along):
    tensors, dy = operands(shape, dtype), torch.randn(*shape[:2], shape[3], shape[6])
    mask = a_mask(shape, shape[0] if masks is None else 1) if masks != 0 else None
    options = {"scale": 0.8 * shape[5] ** -0.5}
    found = outcome(lambda *x: along(*x, mask=mask, **options), tensors, dy)
    assert_close(found, truth(tensors, dy, attn_mask=mask, **options), dtype)


def test_gradients_of_many_blocks_are_added_in_fp32(along):
    """Thirty parts of one sign: in bf16 a sum would soon be too large to grow by the next."""
    T = 30 * QUERIES
    tensors = operands((1, 1, 1, T, T, 4, 4), BF16)
    tensors[0].zero_()  # each key gets an equal share of every later query
    dy = torch.rand(1, 1, T, 4) * torch.arange(1, T + 1)[:, None]  # as much of each
    dv = outcome(lambda *x: along(*x, causal=True), tensors, dy)[3]
    right = truth(tensors, dy.bfloat16(), is_causal=True)[3]
    assert (dv.double() - right).norm() < 2.5e-3 * right.norm()


@pytest.mark.parametrize("path", [*PATHS, "reference"])
def test_a_query_that_sees_nothing_gets_nothing(path, monkeypatch):
    take(path, monkeypatch)
    dtype = BF16 if path == "whole" else SINGLE
    q, k, v = operands((2, 2, 2, 9, 6, 4, 4), dtype)
    mask = torch.ones(2, 1, 9, 6, dtype=torch.bool)
    mask[0, :, 3] = False
    impl = "reference" if path == "reference" else None
    found = outcome(
        lambda *x: attention(*x, mask=mask, impl=impl), (q, k, v), torch.ones(2, 2, 9, 4)
    )
    assert not found[0][0, :, 3].any() and not found[1][0, :, 3].any()
    assert all(torch.isfinite(x).all() for x in found)
    seen = mask.clone()
    seen[0, :, 3] = True
    wanted = truth((q, k, v), torch.ones(2, 2, 9, 4), attn_mask=seen)
    assert_close([x[1] for x in found], [x[1] for x in wanted], dtype)


@pytest.mark.parametrize(
    "shape",
    [(1, 4, 4, 300, 300, 16, 16), (2, 4, 2, 9, 9, 8, 8), (2, 6, 2, 7, 7, 80, 80)],
    ids=str,
)
def test_same_bits_whatever_the_threads(shape, monkeypatch):
    """As long as they have heads enough; then by plain products, which round scores."""
    tensors, dy = operands(shape, BF16), torch.randn(*shape[:2], shape[3], shape[6])
    wanted = truth(tensors, dy, is_causal=True)
    found = {}
    for threads in (1, 2, 3, 4, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found[threads] = outcome(lambda *x: attention(*x, causal=True), tensors, dy)
        assert_close(found[threads], wanted, BF16)
    for threads in (2, 3, 4):
        for x, y in zip(found[threads], found[1], strict=True):
            kit.assert_same_bits(x, y, f"{threads} threads")


@pytest.mark.parametrize("queries", [1, 8])
def test_scores_of_one_pass_are_not_rounded(queries):
    """A query that tells keys apart by less than bf16 does, around a score of 200."""
    q = torch.full((1, 1, queries, 64), 1.0).bfloat16()
    k = torch.full((1, 1, 8, 64), 200.0).bfloat16()
    k[0, 0, :, 0] = torch.linspace(200, 207, 8)
    v = torch.eye(8).expand(1, 1, 8, 8).bfloat16()
    if eager.whole_pass(q, k, v) is None:
        pytest.skip("there is no such pass here")
    y = attention(q, k, v, scale=1.0)
    right = (q.double() @ k.double().mT).softmax(3)
    assert (y.double() - right).abs().max() < 4e-3


def test_large_scores_keep_their_differences(along):
    tensors = operands((1, 2, 2, 9, 9, 4, 4))
    tensors[0].mul_(300)
    dy = torch.randn(1, 2, 9, 4)
    y, dv = outcome(lambda *x: along(*x, causal=True), tensors, dy)[::3]
    right, of_v = truth(tensors, dy, is_causal=True)[::3]
    torch.testing.assert_close(y.double(), right, rtol=1e-4, atol=1e-5)  # scores err by 3e-5
    torch.testing.assert_close(dv.double(), of_v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_stays_in_its_rows(value, along):
    q, k, v = operands((1, 1, 1, 6, 6, 4, 4))
    q[0, 0, 2] = value
    y = along(q, k, v, causal=True)
    assert y[0, 0, 2].isnan().all()
    assert torch.isfinite(y[0, 0, [0, 1, 3, 4, 5]]).all()


def test_what_is_not_seen_does_not_matter():
    """Queries of a tile that does not reach a value that is not finite: in the one pass."""
    q, k, v = (x.requires_grad_() for x in operands((2, 1, 1, 40, 40, 8, 8), BF16))
    if eager.whole_pass(q, k, v) is None:
        pytest.skip("there is no such pass here")
    with torch.no_grad():
        v[:, :, 10] = math.inf
    y = attention(q, k, v, causal=True)
    y.backward(torch.ones_like(y))
    assert y[:, :, :8].isfinite().all() and q.grad[:, :, :8].isfinite().all()
    assert not y[:, :, 10:].isfinite().any()


def test_what_lies_behind_the_keys_that_are_seen_is_not_read():
    """A static cache that is not full, a query of each sequence at another place."""
    q, k, v = operands((2, 4, 2, 1, 40, 8, 8), BF16)
    if eager.whole_pass(q, k, v) is None:
        pytest.skip("there is no such pass here")
    mask = torch.arange(40) < torch.tensor([23, 9])[:, None, None, None]
    k[:, :, 23:], v[:, :, 23:] = math.nan, math.nan
    y = attention(q, k, v, mask=mask)
    for i, keys in ((0, 23), (1, 9)):
        shorter = q[i : i + 1], k[i : i + 1, :, :keys], v[i : i + 1, :, :keys]
        kit.assert_same_bits(y[i : i + 1], attention(*shorter), f"{keys} keys")


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_one_query_that_no_pass_takes_is_torchs(heads, masked):
    """Heads that share keys, and those that do not."""
    tensors, dy = operands((2, 4, heads, 1, 9, 8, 6)), torch.randn(2, 4, 1, 6)
    mask = a_mask((2, 4, heads, 1, 9, 8, 6), 2) if masked else None
    assert explain(attention, *tensors, mask=mask).strategy == "torch"
    found = outcome(lambda *x: attention(*x, mask=mask), tensors, dy)
    assert_close(found, truth(tensors, dy, attn_mask=mask), SINGLE)


def test_one_query_of_a_long_cache_in_bf16_is_not_left_to_torch(monkeypatch):
    """Where no pass is compiled: heads with keys of their own, which torch is slow at."""
    monkeypatch.setattr(native, "over_bf16", lambda passes: None)
    for heads, keys, mine in ((4, 512, True), (4, 511, False), (2, 512, False)):
        tensors = operands((1, 4, heads, 1, keys, 8, 8), BF16)
        assert (explain(attention, *tensors).strategy != "torch") == mine, (heads, keys)


@pytest.mark.parametrize("layout", [kit.transposed, kit.sliced, kit.offset])
def test_any_layout(layout, along):
    tensors = operands((2, 4, 2, 7, 7, 8, 8))
    dy = torch.randn(2, 4, 7, 8)
    wanted = truth(tensors, dy, is_causal=True)
    leaves = [layout(x.flatten(0, 2)).unflatten(0, x.shape[:3]) for x in tensors]
    leaves = [x.detach().requires_grad_() for x in leaves]
    y = along(*leaves, causal=True)
    y.backward(dy.transpose(2, 3).contiguous().transpose(2, 3))
    assert_close([y.detach(), *(x.grad for x in leaves)], wanted, SINGLE)


@pytest.mark.parametrize("queries", [QUERIES + 5, 5])
@pytest.mark.parametrize("dtype", [SINGLE, BF16], ids=str)
def test_nothing_is_read_or_written_outside(dtype, queries, along, guarded_allocations):
    tensors = operands((1, 2, 1, queries, queries, 6, 6), dtype)
    dy = torch.randn(1, 2, queries, 6)
    found = outcome(lambda *x: along(*x, causal=True), tensors, dy)
    assert all(torch.isfinite(x.float()).all() for x in found)


@pytest.mark.parametrize("shape", [(0, 2, 1, 4, 4, 8, 8), (2, 2, 1, 0, 3, 4, 4)], ids=str)
def test_nothing_at_all(shape, along):
    tensors = operands(shape)
    dy = torch.randn(*shape[:2], shape[3], shape[6])
    found = outcome(lambda *x: along(*x, mask=None), tensors, dy)
    for x, like in zip(found[1:], tensors, strict=True):
        assert x.shape == like.shape and not x.any()


def test_inputs_are_left_alone_and_two_runs_agree(along):
    tensors = operands((2, 4, 2, QUERIES + 9, QUERIES + 9, 8, 8), BF16)
    before, dy = [x.clone() for x in tensors], torch.randn(2, 4, QUERIES + 9, 8)
    first, second = (outcome(lambda *x: along(*x, causal=True), tensors, dy) for _ in range(2))
    for x, y in zip((*tensors, *first), (*before, *second), strict=True):
        kit.assert_same_bits(x, y, "two runs")


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_subsets_of_gradients(wanted, along):
    tensors, dy = operands((1, 2, 1, 6, 6, 4, 4)), torch.randn(1, 2, 6, 4)
    each = outcome(lambda *x: along(*x, causal=True), tensors, dy)[1:]
    leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
    along(*leaves, causal=True).backward(dy)
    for i, leaf in enumerate(leaves):
        if i in wanted:
            kit.assert_same_bits(leaf.grad, each[i], f"gradient {i}")
        else:
            assert leaf.grad is None


def test_gradients_in_double():
    q, k, v = (x.requires_grad_() for x in operands((1, 4, 2, 5, 5, 3, 3), DOUBLE))
    mask = a_mask((1, 4, 2, 5, 5, 3, 3), 1)
    torch.autograd.gradcheck(lambda *x: attention(*x, causal=True), (q, k, v))
    torch.autograd.gradcheck(lambda *x: attention(*x, mask=mask), (q, k, v))


@pytest.mark.parametrize("masked", [False, True])
def test_torch_accepts_the_operators(masked):
    tensors = operands((2, 4, 2, 5, 6, 8, 4))
    mask = a_mask((2, 4, 2, 5, 6, 8, 4), 2) if masked else None
    arguments = (*(x.requires_grad_() for x in tensors), mask, 0.5, False)
    torch.library.opcheck(torch.ops.artemis.attention.default, arguments)
    bare = (*(x.detach() for x in tensors), mask, 0.5, False)
    torch.library.opcheck(torch.ops.artemis.attention_forward.default, bare)
    y, kept = torch.ops.artemis.attention_forward(*bare)
    torch.library.opcheck(
        torch.ops.artemis.attention_backward.default,
        (torch.randn_like(y), *bare[:4], kept, 0.5, False),
    )


def test_compiles_whole():
    tensors, dy = operands((1, 2, 1, 6, 6, 4, 4)), torch.randn(1, 2, 6, 4)
    run = torch.compile(lambda *x: attention(*x, causal=True), backend="aot_eager", fullgraph=True)
    found, wanted = (outcome(f, tensors, dy) for f in (run, lambda *x: attention(*x, causal=True)))
    for x, y in zip(found, wanted, strict=True):
        kit.assert_same_bits(x, y, "compiled")


def test_one_query_compiles_whole():
    """Which pass there is cannot be asked then: the operator does."""
    q, k, v = operands((1, 2, 1, 1, 6, 4, 4), BF16)
    run = torch.compile(attention, backend="aot_eager", fullgraph=True)
    kit.assert_same_bits(run(q, k, v), attention(q, k, v, impl="eager"), "compiled")


def test_a_second_derivative_is_refused():
    q, k, v = (x.requires_grad_() for x in operands((1, 1, 1, 3, 3, 2, 2)))
    with pytest.raises(Unavailable, match="^attention: .*second derivative"):
        torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(2, 3, 4)}, ValueError, "q must have shape"),
        ({"q": torch.zeros(1, 2, 3, 4, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"k": torch.zeros(1, 1, 3, 5)}, ValueError, "k must have shape"),
        ({"v": torch.zeros(1, 1, 4, 4)}, ValueError, "v must have shape"),
        ({"k": torch.zeros(1, 1, 3, 4, dtype=DOUBLE)}, TypeError, "k is torch.float64, but q is"),
        ({"q": torch.zeros(1, 3, 3, 4), "k": torch.zeros(1, 2, 3, 4),
          "v": torch.zeros(1, 2, 3, 4)}, ValueError, "3 heads, which 2 of k cannot share"),
        ({"k": torch.zeros(1, 1, 0, 4), "v": torch.zeros(1, 1, 0, 4)}, ValueError, "S > 0"),
        ({"k": torch.zeros(1, 1, 2, 4), "v": torch.zeros(1, 1, 2, 4), "causal": True},
         ValueError, "as many keys as queries, got 2 and 3"),
        ({"scale": 0.0}, ValueError, "scale must be None or a number above 0"),
        ({"scale": True}, ValueError, "scale must be None or a number above 0"),
        ({"mask": torch.zeros(1, 1, 3, 3)}, TypeError, "mask must be a bool tensor"),
        ({"mask": torch.ones(1, 2, 3, 3, dtype=torch.bool)}, ValueError, "mask must have shape"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, ValueError, "mask must have shape"),
        ({"mask": torch.ones(1, 1, 3, 3, dtype=torch.bool), "causal": True}, ValueError, "exclude"),
        ({"impl": "cuda"}, ValueError, "impl must be"),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, words):
    q, k, v = operands((1, 2, 1, 3, 3, 4, 4))
    with pytest.raises(error, match=f"attention: .*{words}"):
        attention(**{"q": q, "k": k, "v": v} | change)


def test_explains_its_path():
    q, k, v = operands((1, 2, 1, 3, 3, 4, 4))
    assert explain(attention, q, k, v).strategy in ("compiled", "plain")
    long = operands((2, 2, 2, 9, 9, 4, 4), BF16)
    for some in (long, (long[0][:, :, :3], *long[1:])):
        one_pass = eager.whole_pass(*some) is not None
        assert (explain(attention, *some).strategy == "one_pass") == one_pass
    assert explain("attention", *(x.double() for x in (q, k, v))).strategy == "plain"
    assert explain(attention, q, k, v, impl="reference").strategy == "composed"
    half, whole = (explain(attention, q, k, v, causal=c).cost.flops for c in (True, False))
    assert whole == 2 * 2 * 3 * 3 * (4 + 4) and half == whole // 2
    with pytest.raises(Unavailable, match="no Triton kernel"):
        attention(q, k, v, impl="triton")


def test_under_autocast_nothing_is_cast_again():
    q, k, v = operands((1, 2, 1, 5, 5, 4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        inside = attention(q, k, v, causal=True)
    kit.assert_same_bits(inside, attention(q, k, v, causal=True), "inside")
