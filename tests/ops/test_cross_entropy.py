"""`cross_entropy`: torch's own in fp64 is the truth, at any dtype, shape and path."""

import math

import pytest
import torch
from torch.nn import functional

from artemis_kernels import Unavailable, cross_entropy, explain
from artemis_kernels.core import native
from artemis_kernels.core.device import why_no_triton
from tests import kit

SINGLE, BF16, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
IGNORED = -100

PATHS = ["compiled", "plain"]
if why_no_triton(torch.device("cpu")) is None:
    PATHS.append("triton")
# Rows and classes: one of each, below and past the passes' blocks, whole ones, a last one of one.
SHAPES = [(1, 1), (3, 2), (5, 17), (2, 1024), (7, 1025), (129, 33), (2, 4096), (3, 9000), (0, 9)]


def operands(m: int, n: int, dtype=SINGLE, spread=4.0):
    logits = (torch.randn(m, n) * spread).to(dtype)
    target = torch.randint(n, (m,))
    target[1::3] = IGNORED
    return logits, target


@pytest.fixture(params=PATHS)
def along(request, monkeypatch):
    """Losses of rows by a path, the operation's own choice set aside."""
    if request.param == "plain":
        monkeypatch.setattr(native, "library_for", lambda x: None)

    def losses(logits, target):
        if request.param == "compiled" and native.library_for(logits) is None:
            pytest.skip("there is no compiled pass for these logits")
        if request.param == "triton" and logits.dtype == BF16:
            pytest.skip("the interpreter truncates to bf16")
        impl = request.param if request.param in ("triton", "reference") else "eager"
        return cross_entropy(logits, target, reduction="none", impl=impl)

    return losses


def truth(logits, target, d):
    """Losses and their gradient in fp64 by torch."""
    x = logits.double().requires_grad_()
    losses = functional.cross_entropy(x, target, ignore_index=IGNORED, reduction="none")
    losses.backward(d.double())
    return losses.detach(), x.grad


def assert_right(got, dlogits, logits, target, d):
    losses, gradient = truth(logits, target, d)
    torch.testing.assert_close(got.double(), losses, rtol=2e-6, atol=2e-6)
    # Of the row's d: what is stored is rounded once, from fp32.
    step = torch.finfo(logits.dtype).eps / 2 * gradient.abs()
    allowed = step + 4e-6 * d.double().abs()[:, None]
    if logits.dtype == HALF:
        allowed += 2.0**-25  # half a step of its smallest numbers
    assert ((dlogits.double() - gradient).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [SINGLE, BF16, HALF], ids=str)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_follows_torch_in_double(m, n, dtype, along):
    logits, target = operands(m, n, dtype)
    x, d = logits.clone().requires_grad_(), torch.randn(m)
    losses = along(x, target)
    losses.backward(d)
    assert losses.dtype == SINGLE and x.grad.dtype == dtype
    assert_right(losses.detach(), x.grad, logits, target, d)
    kit.assert_same_bits(x.detach(), logits, "logits, an input")


@pytest.mark.parametrize("offset", [0.0, 3e4, -3e4])
def test_large_logits_keep_their_differences(offset, along):
    """One number for `most + log_sum` would round at 3e4 by a thousandth: a thousandth of p."""
    logits, target = operands(6, 1500)
    logits += offset
    x, d = logits.clone().requires_grad_(), torch.ones(6)
    losses = along(x, target)
    losses.backward(d)
    assert_right(losses.detach(), x.grad, logits, target, d)


def test_masked_classes_and_what_is_not_finite(along):
    logits, target = torch.randn(6, 8300), torch.arange(6)
    logits[0, 5:] = -math.inf  # most of a row, and all of its later blocks
    logits[1, :8250] = -math.inf  # its earlier ones
    target[1] = 8260
    logits[2, 2] = -math.inf  # the target itself: an infinite loss
    logits[3, 7] = math.nan
    logits[4] = -math.inf
    logits[5, 9] = math.inf
    x = logits.clone().requires_grad_()
    losses = along(x, target)
    losses.sum().backward()
    wanted, gradient = truth(logits, target, torch.ones(6))
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
    for row in range(4):  # in the last two nothing but nan is right, and torch differs in which
        close = (x.grad[row].double() - gradient[row]).abs() < 1e-5
        assert (close | gradient[row].isnan() & x.grad[row].isnan()).all(), row
    assert x.grad[4].isnan().any() and x.grad[5].isnan().any()


@pytest.mark.parametrize("along", [*PATHS, "reference"], indirect=True)
def test_an_ignored_row_passes_nothing_on(along):
    """Not even what is not finite: padding may hold anything."""
    logits, target = operands(6, 50)
    logits[1], logits[4, 7] = math.nan, math.inf
    assert (target[[1, 4]] == IGNORED).all()
    x = logits.clone().requires_grad_()
    losses = along(x, target)
    losses.sum().backward()
    assert not losses[[1, 4]].any() and not x.grad[[1, 4]].any()
    assert torch.isfinite(losses).all() and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("layout", [kit.transposed, kit.sliced, kit.offset])
def test_any_layout(layout, along):
    logits, target = operands(9, 40)
    d = torch.randn(9)
    x = layout(logits).detach().requires_grad_()
    losses = along(x, target)
    losses.backward(d)
    assert_right(losses.detach(), x.grad, logits, target, d)


@pytest.mark.parametrize("dtype", [SINGLE, BF16], ids=str)
def test_nothing_is_read_or_written_outside(dtype, along, guarded_allocations):
    logits, target = operands(5, 1030, dtype)
    x = logits.clone().requires_grad_()
    along(x, target).sum().backward()
    assert torch.isfinite(x.grad.float()).all()


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("dtype", [SINGLE, BF16, HALF, DOUBLE], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 0)], ids=str)
def test_reductions_and_leading_dimensions(leading, reduction, dtype, impl):
    logits = torch.randn(*leading, 11).to(dtype)
    target = torch.randint(11, leading)
    if leading:
        target[..., :1] = 3
    got = cross_entropy(logits, target, ignore_index=3, reduction=reduction, impl=impl)
    rows = logits.double().reshape(-1, 11), target.reshape(-1)
    wanted = functional.cross_entropy(*rows, ignore_index=3, reduction=reduction)
    wanted = wanted.reshape(leading if reduction == "none" else ())
    assert got.dtype == (DOUBLE if dtype == DOUBLE else SINGLE)
    torch.testing.assert_close(got.double(), wanted, rtol=2e-6, atol=2e-6, equal_nan=True)


def test_gradcheck():
    logits, target = operands(5, 7, DOUBLE, spread=1.0)
    logits.requires_grad_()
    torch.autograd.gradcheck(lambda x: cross_entropy(x, target), logits)
    torch.autograd.gradcheck(lambda x: cross_entropy(x, target, reduction="none"), logits)


def test_backward_twice_over_one_graph_and_no_second_derivative():
    logits, target = operands(5, 7)
    x = logits.clone().requires_grad_()
    loss = cross_entropy(x, target)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x, retain_graph=True)
    kit.assert_same_bits(second, first)
    for scalar in (loss, loss.square()):
        with pytest.raises(Unavailable, match="^cross_entropy: .*second derivative"):
            torch.autograd.grad(scalar, x, create_graph=True)


@pytest.mark.parametrize("impl", ["eager", "triton"] if "triton" in PATHS else ["eager"])
def test_opcheck(impl):
    logits, target = operands(4, 6)
    arguments = (logits.requires_grad_(), target, IGNORED, impl)
    torch.library.opcheck(torch.ops.artemis.cross_entropy.default, arguments)
    below = torch.ops.artemis.cross_entropy_forward.default
    torch.library.opcheck(below, (logits.detach(), *arguments[1:]))
    _, kept = below(logits.detach(), *arguments[1:])
    torch.library.opcheck(
        torch.ops.artemis.cross_entropy_backward.default,
        (torch.ones(4), logits.detach(), target, kept, IGNORED, impl),
    )


@pytest.mark.parametrize("dtype", [SINGLE, HALF, DOUBLE], ids=str)
def test_opcheck_of_logits_that_lie_by_classes(dtype):
    """A compiled graph relies on the strides that it was told of."""
    logits, target = operands(4, 6, dtype)
    arguments = (kit.transposed(logits).requires_grad_(), target, IGNORED, "eager")
    torch.library.opcheck(torch.ops.artemis.cross_entropy.default, arguments)
    rows = arguments[0].detach()
    _, kept = torch.ops.artemis.cross_entropy_forward(rows, *arguments[1:])
    torch.library.opcheck(
        torch.ops.artemis.cross_entropy_backward.default,
        (torch.ones(4, dtype=kept.dtype), rows, target, kept, IGNORED, "eager"),
    )


def test_compiles_into_one_graph():
    logits, target = operands(4, 6)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: cross_entropy(x, target), backend="aot_eager", fullgraph=True
    )
    gradients = []
    for run in (compiled, lambda x: cross_entropy(x, target)):
        x = logits.clone().requires_grad_()
        run(x).backward()
        gradients.append(x.grad)
    kit.assert_same_bits(*gradients)


def test_autocast_leaves_the_logits_as_they_are():
    logits, target = operands(4, 6, BF16)
    x = logits.requires_grad_()
    with torch.autocast("cpu", BF16):
        loss = cross_entropy(x, target)
    loss.backward()
    assert loss.dtype == SINGLE and x.grad.dtype == BF16


def test_torchs_default_dtype_does_not_matter():
    logits, target = operands(4, 6)
    wanted = cross_entropy(logits, target)
    torch.set_default_dtype(DOUBLE)
    try:
        got = cross_entropy(logits, target)
    finally:
        torch.set_default_dtype(SINGLE)
    kit.assert_same_bits(got, wanted)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "logits must be a floating"),
        ({"logits": torch.tensor(1.0)}, ValueError, r"logits must have shape \(\.\.\., classes\)"),
        ({"logits": torch.ones(2, 0)}, ValueError, "classes"),
        ({"target": torch.ones(2)}, TypeError, "target must be an int64 tensor, got torch.float32"),
        ({"target": torch.tensor([1])}, ValueError, r"target must have shape \(2,\), got \(1,\)"),
        ({"target": torch.tensor([0, 3])}, ValueError, r"in \[0, 3\) or -100.*got 3"),
        ({"target": torch.tensor([-1, 0])}, ValueError, "got -1"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got 1.5"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"impl": "cuda"}, ValueError, "impl must be"),
    ],
)
def test_refusals(change, error, words):
    arguments = {"logits": torch.ones(2, 3), "target": torch.tensor([0, 1])} | change
    with pytest.raises(error, match=f"cross_entropy: .*{words}"):
        cross_entropy(**arguments)


def test_explain_names_the_path_of_the_call():
    logits, target = operands(4, 6)
    assert explain(cross_entropy, logits, target).strategy in ("compiled", "plain")
    assert explain("cross_entropy", logits.double(), target).strategy == "plain"
    assert explain(cross_entropy, logits, target, impl="reference").strategy == "composed"
    if why_no_triton(torch.device("cpu")) is None:
        with pytest.raises(Unavailable, match="float64"):
            explain(cross_entropy, logits.double(), target, impl="triton")
