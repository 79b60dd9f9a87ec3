"""`bottleneck_adapter` on every path against its meaning."""

import pytest
import torch

from artemis_kernels.ops.bottleneck_adapter.branch import Branch, BranchNeeds
from artemis_kernels.ops.bottleneck_adapter.op import LAUNCHES_BACK, backward_cost
from tests import kit
from tests.kit import SIZES, Sizes
from tests.ops.operations import (
    BOTTLENECK,
    INTERPRETED,
    SINGLE,
    Path,
    away_from_the_bend,
    follow_reference,
)


@pytest.mark.parametrize("sizes", kit.HARD_SHAPES)
@pytest.mark.parametrize("path", BOTTLENECK.paths())
def test_hard_shapes(path, sizes):
    follow_reference(BOTTLENECK, path, BOTTLENECK.operands(sizes, path.dtype))


@pytest.mark.parametrize("path", BOTTLENECK.paths())
def test_no_width(path, guarded_allocations):
    """The bias and the scale still learn; what nobody writes is nan here."""
    follow_reference(BOTTLENECK, path, BOTTLENECK.operands(Sizes(33, 40, 0, 0), path.dtype))


@pytest.mark.parametrize("path", BOTTLENECK.paths())
def test_residual_is_x(path):
    tensors = BOTTLENECK.operands(SIZES, path.dtype, without=("residual",))
    follow_reference(BOTTLENECK, path, tensors)


@pytest.mark.parametrize("activation", kit.ACTIVATIONS)
@pytest.mark.parametrize("path", BOTTLENECK.paths())
def test_activations(path, activation):
    tensors = away_from_the_bend(BOTTLENECK.operands(SIZES, path.dtype), activation)
    follow_reference(BOTTLENECK, path, tensors, activation=activation)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(SIZES, id="even-width"),
        pytest.param(Sizes(65, 33, 0, 7), id="odd-width"),  # a row may start in mid-hash
        pytest.param(Sizes(20, 64, 0, 300), id="wide"),  # beyond what a row block holds
    ],
)
@pytest.mark.parametrize("path", BOTTLENECK.paths())
def test_dropout(path, sizes):
    if path.strategy == "row_block" and sizes.r > 256:
        pytest.skip("a row block holds 256 units; wider ones always take two launches")
    tensors = BOTTLENECK.operands(sizes, path.dtype)
    follow_reference(BOTTLENECK, path, tensors, dropout_p=0.3, seed=7, activation="silu")


@pytest.mark.parametrize(
    "absent", [("bias_down",), ("bias_up",), ("bias_down", "bias_up")], ids="+".join
)
@pytest.mark.parametrize("path", BOTTLENECK.paths())
def test_absent_biases(path, absent):
    tensors = BOTTLENECK.operands(SIZES, path.dtype, without=(*absent, "scale"))
    follow_reference(BOTTLENECK, path, tensors, scale=-2.5)


def test_an_fp32_bias_takes_no_digits_of_fp64():
    tensors = BOTTLENECK.operands(SIZES, torch.float64)
    tensors["bias_up"] = tensors["bias_up"].float()
    wanted = BOTTLENECK.reference(**tensors)
    found = BOTTLENECK.along(Path("eager", "addmm", torch.float64))(**tensors)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("silent", ["residual", "up"])
@pytest.mark.parametrize("path", BOTTLENECK.paths())
def test_each_term_alone(path, silent):
    tensors = BOTTLENECK.operands(SIZES, path.dtype)
    follow_reference(BOTTLENECK, path, tensors | {silent: torch.zeros_like(tensors[silent])})


@pytest.mark.parametrize("layout", kit.LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("path", BOTTLENECK.paths())
def test_any_layout(path, layout):
    tensors = BOTTLENECK.operands(Sizes(33, 34, 0, 5), path.dtype)
    hostile = {name: layout(tensors[name]) for name in ("x", "residual", "down", "up")}
    follow_reference(BOTTLENECK, path, tensors | hostile)


@pytest.mark.parametrize(
    "wanted",
    [
        ("x", "up", "bias_up", "scale"),
        ("x", "down", "bias_down"),
        ("down", "up"),
        ("down", "scale"),
    ],
    ids="+".join,
)
@pytest.mark.parametrize("path", BOTTLENECK.paths(SINGLE))
def test_some_gradients(path, wanted):
    """D frozen, U frozen, or x without a gradient: other launches, the same numbers."""
    tensors = BOTTLENECK.operands(SIZES, path.dtype, without=("residual",))
    follow_reference(BOTTLENECK, path, tensors, wanted, dropout_p=0.3, seed=7)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that are launched, in order."""
    from triton.runtime.interpreter import InterpretedFunction

    names, run = [], InterpretedFunction.run

    def recorded(self, *arguments, **options):
        names.append(self.__name__)
        return run(self, *arguments, **options)

    monkeypatch.setattr(InterpretedFunction, "run", recorded)
    return names


@INTERPRETED
@pytest.mark.parametrize("strategy", LAUNCHES_BACK)
def test_launches_of_the_backward(strategy, launched):
    """As many as explain says, whatever biases there are; one more where a sum was split."""
    tensors = BOTTLENECK.operands(Sizes(40, 32, 0, 8), SINGLE, without=("residual",))
    op = BOTTLENECK.along(Path("triton", strategy, SINGLE))
    kit.outcome(op, tensors)
    forward = len(launched)
    kit.outcome(op, tensors, tensors)
    assert len(launched) - 2 * forward == LAUNCHES_BACK[strategy]
    joint = "_weight_gradients" in launched
    assert joint == (strategy != "two_launch_one_read")
    launched.clear()
    kit.outcome(op, tensors, ("x", "up"))  # a frozen D leaves nothing to join
    assert "_weight_gradients" not in launched


@INTERPRETED
def test_explain_tells_the_backward():
    tensors = BOTTLENECK.operands(Sizes(40, 32, 0, 8), SINGLE, without=("residual",))
    frozen = BOTTLENECK.explained(impl="triton", **tensors)
    assert "backward" not in frozen.reason
    tensors["down"].requires_grad_()
    choice = BOTTLENECK.explained(impl="triton", **tensors)
    moved = backward_cost(40, 32, 8, 4, choice.strategy).bytes / 1e6
    told = f"backward: {LAUNCHES_BACK[choice.strategy]} launches, {moved:.3g} MB"
    assert told in choice.reason and choice.cost == frozen.cost


def test_bytes_of_the_backward():
    """In 16 bits a row block's dz and h move 4 bytes less a unit than dz in fp32 did."""
    m, hidden, width = 16384, 2048, 64
    cost = backward_cost(m, hidden, width, 2, "row_block")
    assert cost.flops == 8 * m * hidden * width
    thin = 2 * 4 * hidden * width
    assert cost.bytes == 2 * 4 * m * hidden + thin + m * width * (4 + 2 * (2 + 2))
    again = backward_cost(m, hidden, width, 2, "two_launch").bytes - cost.bytes
    assert again == 2 * m * hidden + m * width * 2 * 2
    one_read = backward_cost(m, hidden, width, 2, "two_launch_one_read").bytes - cost.bytes
    assert one_read == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 4])
def test_gradients_hold_no_more_than_they_are(width, dtype):
    """Each is a tensor of its own: no part of a larger one, and none of another's storage."""
    branch = Branch(torch.randn(3, width), torch.randn(3), 0.7, None, "gelu", 0.0, None)
    dy, z = torch.randn(5, 3).to(dtype), torch.randn(5, width).to(dtype)
    found = branch.backward(dy, z, BranchNeeds(up=True, scale_tensor=False, bias_up=True))
    gradients = found.dup, found.dbias_up
    assert [g.dtype for g in gradients] == [torch.float32] * 2
    assert all(g.untyped_storage().nbytes() == g.nbytes for g in gradients)
