"""`quantized_linear`: a packed weight's bare product, judged by the dequantized one; a tensor's."""

import functools
import subprocess
import sys

import pytest
import torch

import artemis_kernels
from artemis_kernels import QuantizedWeight, Unavailable, explain, quantized_linear
from artemis_kernels.ops.quantized_linear.reference import quantized_linear as reference
from tests import kit
from tests.ops.operations import INTERPRETED

FORMATS = ("int8", "fp8", "int4")


def operands(rows: int, dtype, format: str, activation_bits=16):
    tensors = {"x": torch.randn(rows, 3, 40).to(dtype), "bias": torch.randn(24).to(dtype)}
    weight = QuantizedWeight.quantize(torch.randn(24, 40), format, activation_bits=activation_bits)
    return tensors, weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("format", FORMATS)
def test_follows_the_dequantized_product(format, rows, dtype):
    tensors, weight = operands(rows, dtype, format)
    kit.assert_follows_reference(
        lambda **t: quantized_linear(weight=weight, **t),
        lambda x, bias: reference(x, weight.dequantize(x.dtype), bias),
        tensors, ["x", "bias"], c=1.25,
    )  # fmt: skip


@pytest.mark.parametrize("lay", [torch.clone, kit.transposed, kit.sliced])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("impl", ["eager", pytest.param("triton", marks=INTERPRETED)])
def test_follows_the_product_of_a_tensor(impl, rows, dtype, lay):
    tensors, _ = operands(rows, dtype, "int8")
    weight = lay(torch.randn(24, 40).to(dtype))
    kit.assert_follows_reference(
        lambda **t: quantized_linear(weight=weight, impl=impl, **t),
        lambda x, bias: reference(x, weight.to(x.dtype), bias),
        tensors, ["x", "bias"], c=1.25,
    )  # fmt: skip


def test_a_weight_that_trains_is_the_references():
    tensors, packed = operands(2, torch.float32, "int8")
    weight = packed.dequantize().requires_grad_()
    assert explain(quantized_linear, tensors["x"], weight).impl == "reference"
    quantized_linear(tensors["x"], weight).sum().backward()
    torch.testing.assert_close(weight.grad, tensors["x"].sum((0, 1)).expand(24, 40))
    with pytest.raises(Unavailable, match="takes a frozen weight"):
        quantized_linear(tensors["x"], weight, impl="eager")
    with torch.no_grad():
        assert explain(quantized_linear, tensors["x"], weight).strategy == "product"


@pytest.mark.parametrize("subset", kit.subsets(["x", "bias"]))
def test_every_subset_of_gradients(subset):
    tensors, weight = operands(2, torch.float32, "int8")
    whole = kit.outcome(quantized_linear, tensors, ["x", "bias"], weight=weight)
    part = kit.outcome(quantized_linear, tensors, subset, weight=weight)
    kit.assert_same_outcome(part, {name: whole[name] for name in ("y", *subset)})


def test_eight_bit_inputs_err_by_their_rounding_and_no_more():
    """x and dY rounded to 127 steps a row: an rms error near 1/127/√3 of the row's maximum."""
    tensors, weight = operands(20, torch.float32, "int8", activation_bits=8)
    assert explain(quantized_linear, weight=weight, **tensors).strategy == "product_int8"
    got = kit.outcome(quantized_linear, tensors, ["x"], torch.randn(20, 3, 24), weight=weight)
    torch.manual_seed(0)
    dy = torch.randn(20, 3, 24)
    got = kit.outcome(quantized_linear, tensors, ["x"], dy, weight=weight)
    exact = kit.outcome(reference, tensors, ["x"], dy, weight=weight.dequantize(torch.float32))
    for name in ("y", "x"):
        error = (got[name] - exact[name]).norm() / exact[name].norm()
        assert 1e-4 < error < 0.02, name


@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize("format", FORMATS)
def test_torchs_default_dtype_does_not_matter(format, rows):
    """The compiled passes write fp32 into memory that must have been made as fp32."""
    tensors, weight = operands(rows, torch.float32, format, "auto")
    x, a, b = tensors["x"][:, :1], torch.randn(4, 40), torch.randn(24, 4)

    def gradients():
        run = functools.partial(
            artemis_kernels.lora_linear, weight=weight, scale=1.0, dropout_p=0.5, seed=3
        )
        names = {"x": x, "lora_a": a, "lora_b": b}
        return kit.outcome(run, names, list(names), torch.ones(rows, 1, 24))

    wanted = gradients()
    torch.set_default_dtype(torch.float64)
    try:
        got = gradients()
    finally:
        torch.set_default_dtype(torch.float32)
    kit.assert_same_outcome(got, wanted)


UNALIGNED = """
import itertools, sys
from dataclasses import replace
import torch
from artemis_kernels import QuantizedWeight, quantized_linear
from artemis_kernels.core import native, packed_passes
from artemis_kernels.core.native import Native

if sys.argv[1] == "no bf16 dot products":
    packed_passes.has_bf16_rows = lambda: False
elif sys.argv[1] == "nothing compiled":
    native.library = lambda: Native(None, "switched off")

def moved(tensor, by):
    line, room = 64, torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
    start = -room.data_ptr() % line + by
    return room[start:start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

weight = QuantizedWeight.quantize(torch.randn(64, 96), activation_bits=16)
of_x, of_weight = (0, 4, 16, 32, 40), (0, 1, 8, 16)
for dtype, rows, x_by, by in itertools.product(
    (torch.bfloat16, torch.float32), (1, 2, 3, 4), of_x, of_weight
):
    print(dtype, rows, x_by, by, end="; ", flush=True)
    held = replace(weight, data=moved(weight.data, by), scale=moved(weight.scale, 4 * by))
    x = moved(torch.randn(rows, 96).to(dtype), x_by)
    truth = x.double() @ weight.dequantize(torch.float64).t()
    error = (quantized_linear(x, held) - truth).norm() / truth.norm()
    assert error < 0.01, error
"""


@pytest.mark.parametrize("way", ["as it is", "no bf16 dot products", "nothing compiled"])
def test_tensors_that_start_anywhere(way):
    """Views, and files that lie in memory. In a process of its own, which a crash would end."""
    done = subprocess.run([sys.executable, "-c", UNALIGNED, way], capture_output=True, text=True)
    assert not done.returncode, (done.stdout[-60:], done.stderr)


def test_agrees_with_a_lora_of_zero_bit_for_bit():
    tensors, weight = operands(50, torch.bfloat16, "int8", activation_bits=8)
    zero = artemis_kernels.lora_linear(
        tensors["x"], weight, torch.randn(4, 40), torch.zeros(24, 4), 1.0, bias=tensors["bias"]
    )
    assert torch.equal(quantized_linear(weight=weight, **tensors), zero)


def test_refusals():
    tensors, weight = operands(2, torch.float32, "int8")
    with pytest.raises(TypeError, match="weight must be a floating-point tensor, got NoneType"):
        quantized_linear(tensors["x"], None)
    with pytest.raises(TypeError, match="weight is torch.float64, but x is torch.float32"):
        quantized_linear(tensors["x"], weight.dequantize().double())
    with pytest.raises(ValueError, match=r"weight must have shape \(any, 40\)"):
        quantized_linear(tensors["x"], torch.zeros(24, 41))
    with pytest.raises(ValueError, match=r"bias must have shape \(24\)"):
        quantized_linear(tensors["x"], weight, bias=torch.zeros(3))
    with pytest.raises(Unavailable, match="float64"):
        quantized_linear(tensors["x"].double(), weight, impl="triton")


def test_the_operator_is_whole_to_torch():
    """Schema, fake, autograd registration and traced gradients; and one graph under compile."""
    tensors, weight = operands(2, torch.float32, "int4")
    x = tensors["x"].reshape(-1, 40).requires_grad_()
    parts = (
        weight.data,
        tensors["bias"],
        "eager",
        "product_weight_only",
        weight.scale,
        weight.offset,
    )
    torch.library.opcheck(torch.ops.artemis.quantized_linear.default, (x, *parts))
    plain = (weight.dequantize(), tensors["bias"], "eager", "product")
    torch.library.opcheck(torch.ops.artemis.quantized_linear.default, (x, *plain))
    run = torch.compile(
        lambda x: quantized_linear(x, weight, bias=tensors["bias"]),
        backend="aot_eager", fullgraph=True,
    )  # fmt: skip
    kit.assert_same_outcome(
        kit.outcome(run, {"x": x.detach()}, ["x"]),
        kit.outcome(lambda x: quantized_linear(x, weight, bias=tensors["bias"]),
                    {"x": x.detach()}, ["x"]),
    )  # fmt: skip
