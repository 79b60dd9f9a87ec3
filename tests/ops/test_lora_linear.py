"""`lora_linear` on every path against its meaning, and against PEFT's own layer."""

import pytest
import torch

import artemis_kernels
from tests import kit
from tests.kit import SIZES, Sizes
from tests.ops.operations import LORA, follow_reference


@pytest.mark.parametrize("sizes", kit.HARD_SHAPES)
@pytest.mark.parametrize("path", LORA.paths())
def test_hard_shapes(path, sizes):
    follow_reference(LORA, path, LORA.operands(sizes, path.dtype))


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(SIZES, id="even-in"),
        pytest.param(Sizes(65, 33, 40, 3), id="odd-in"),  # a row may start in mid-hash
        pytest.param(Sizes(20, 64, 40, 70), id="rank-above-64"),  # dY is read twice
    ],
)
@pytest.mark.parametrize("path", LORA.paths())
def test_dropout(path, sizes):
    follow_reference(LORA, path, LORA.operands(sizes, path.dtype), dropout_p=0.3, seed=7)


@pytest.mark.parametrize("silent", [("weight", "bias"), ("lora_b",), ("lora_a",)], ids="+".join)
@pytest.mark.parametrize("path", LORA.paths())
def test_each_term_alone(path, silent):
    tensors = LORA.operands(SIZES, path.dtype)
    silenced = {name: torch.zeros_like(tensors[name]) for name in silent}
    follow_reference(LORA, path, tensors | silenced)


@pytest.mark.parametrize("path", LORA.paths())
def test_number_as_scale_without_bias(path):
    tensors = LORA.operands(SIZES, path.dtype, without=("scale", "bias"))
    follow_reference(LORA, path, tensors, scale=-2.5)


@pytest.mark.parametrize("layout", kit.LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("path", LORA.paths())
def test_any_layout(path, layout):
    tensors = LORA.operands(Sizes(33, 34, 36, 5), path.dtype)
    hostile = {name: layout(tensors[name]) for name in ("x", "weight", "lora_a", "lora_b")}
    follow_reference(LORA, path, tensors | hostile)
    if path.strategy != "one_pass":
        follow_reference(LORA, path, tensors | hostile, dropout_p=0.25, seed=1)


@pytest.mark.parametrize("rank", [1, 8, 20])
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_equals_peft(impl, rank):
    """The same A, B and scale in PEFT's LoRA layer: the same output and gradients."""
    peft = pytest.importorskip("peft")
    linear = torch.nn.Linear(24, 40)
    config = peft.LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=["0"])
    layer = peft.get_peft_model(torch.nn.Sequential(linear), config).base_model.model[0]
    a, b = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    torch.nn.init.normal_(b)
    x = torch.randn(5, 7, 24, requires_grad=True)

    theirs = layer(x)
    dy = torch.randn_like(theirs)
    wanted = torch.autograd.grad(theirs, (x, a, b), dy)
    ours = artemis_kernels.lora_linear(
        x, layer.base_layer.weight, a, b, 3.0, bias=layer.base_layer.bias, impl=impl
    )
    actual = torch.autograd.grad(ours, (x, a, b), dy)
    for have, want in zip((ours, *actual), (theirs, *wanted), strict=True):
        assert (have - want).norm() < 1e-5 * want.norm()  # the order of sums is the machine's
