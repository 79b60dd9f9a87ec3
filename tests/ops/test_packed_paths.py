"""Triton paths over a packed weight, interpreted: y and every gradient, each strategy forced.

By weight only the accuracy rule holds against the dequantized base in fp64; in 8 bits the truth
rounds x and dY as docs/quantization.md says, as it does for the eager path.
"""

import functools
from dataclasses import replace

import pytest
import torch

import artemis_kernels
from artemis_kernels import QuantizedWeight, explain, quantized_linear
from artemis_kernels.core import packed_choice
from artemis_kernels.core.device import CHIPS
from artemis_kernels.core.tiling import Shape
from artemis_kernels.ops.packed import steps
from artemis_kernels.ops.packed.transpose import transpose
from tests import kit
from tests.kit import Sizes, logits_gradient
from tests.ops.operations import ADAPTER, BF16, HALF, INTERPRETED, LORA, SINGLE
from tests.ops.packed import forced, operands, trained, truth_in_eight_bits

pytestmark = INTERPRETED

FORMATS = ("int8", "fp8", "int4")
BY_WEIGHT = [
    (LORA, "split_weight_only"), (LORA, "split_dense"), (LORA, "vendor_dense"),
    (ADAPTER, "plain_weight_only"), (ADAPTER, "folded_weight_only"), (ADAPTER, "plain_dense"),
    (ADAPTER, "folded_vendor_dense"),
]  # fmt: skip
IN_EIGHT_BITS = [
    (LORA, "split", "plain"), (LORA, "vendor", "plain"), (ADAPTER, "plain", "plain"),
    (ADAPTER, "plain_vendor", "plain"), (ADAPTER, "folded", "folded"),
    (ADAPTER, "folded_vendor", "folded"),
]  # fmt: skip
SIZES = [Sizes(1, 24, 17, 1), Sizes(17, 64, 48, 8), Sizes(33, 136, 41, 12)]


@functools.cache
def scales_rows() -> bool:
    """Whether torch multiplies e4m3 with scales by row on a CPU; 2.11 does not."""
    q, scale = torch.zeros(16, 16, dtype=torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(q, q.t(), scale, scale.t().contiguous(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("operation", "strategy"), BY_WEIGHT)
def test_by_weight_only(operation, strategy, format, sizes, dtype):
    tensors, packed = operands(operation, sizes, dtype, format)

    def reference(**arguments):
        return operation.reference(weight=packed, **arguments)

    kit.assert_follows_reference(
        forced(operation, strategy, packed, "triton"), reference, tensors, trained(operation),
        c=2.0 if sizes.m == 1 else 1.25,
    )  # fmt: skip


@pytest.mark.parametrize("term", ["weight", "branch"])
@pytest.mark.parametrize("strategy", ["split_weight_only", "split_int8"])
def test_each_term_alone(strategy, term):
    """A small term would hide behind the rounding of a large one."""
    tensors, packed = operands(LORA, Sizes(17, 64, 48, 8), SINGLE)
    if term == "weight":
        tensors["lora_b"].zero_()
    else:
        packed = QuantizedWeight.quantize(torch.zeros(48, 64))
    dy = torch.randn(17, 48)
    actual = kit.outcome(forced(LORA, strategy, packed, "triton"), tensors, trained(LORA), dy)
    if strategy == "split_int8":
        truth = truth_in_eight_bits(LORA, "plain", packed, tensors, dy)
    else:
        doubles = kit.in_dtype(tensors, torch.float64)
        truth = kit.outcome(
            lambda **a: LORA.reference(weight=packed, **a), doubles, trained(LORA), dy
        )
    for name, wanted in truth.items():
        error = (actual[name].double() - wanted).norm()
        assert error <= 2e-4 * wanted.norm() + 1e-6, f"{name}: {error:.2g}"


@pytest.mark.parametrize(("dtype", "limit"), [(SINGLE, 3e-4), (HALF, 4e-3)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("sizes", [*SIZES[1:], Sizes(40, 304, 128, 16)], ids=str)
@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize(("operation", "strategy", "meaning"), IN_EIGHT_BITS)
def test_in_eight_bits(operation, strategy, meaning, format, sizes, dtype, limit):
    """Codes on the edge between two levels may fall either way; e4m3's steps are wider."""
    if "vendor" in strategy and (sizes.k % 16 or sizes.n % 16):
        pytest.skip("torch's 8-bit products want sides that 16 divides")
    if "vendor" in strategy and format == "fp8" and not scales_rows():
        pytest.skip("this torch has no product of e4m3 with scales by row on a CPU")
    tensors, packed = operands(operation, sizes, dtype, format)
    dy = torch.randn(sizes.m, sizes.n).to(dtype)
    if sizes.k > 200:
        tensors["x"][:, [7, 150]] *= 50
        dy[:, 11] *= 50
    run = forced(operation, f"{strategy}_{format}", packed, "triton")
    actual = kit.outcome(run, tensors, trained(operation), dy)
    truth = truth_in_eight_bits(operation, meaning, packed, tensors, dy)
    for name, wanted in truth.items():
        error = (actual[name].double() - wanted).norm() / wanted.norm()
        allowed = limit * (4 if format == "fp8" else 1) * (4 if wanted.numel() < 100 else 1)
        assert error < allowed, f"{name}: {error:.2g}"


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_a_weight_that_lies_along_out_is_not_copied_for_dx(format, monkeypatch):
    weight = QuantizedWeight.quantize(torch.randn(48, 64), format, activation_bits=8)
    turned = replace(weight, data=kit.transposed(weight.data))
    x, dy, copied = torch.randn(70, 64, requires_grad=True), torch.randn(70, 48), []

    def counted(data, **options):
        copied.append(data)
        return transpose(data, **options)

    monkeypatch.setattr(steps, "transpose", counted)
    ys = [quantized_linear(x, one, impl="triton") for one in (weight, turned)]
    wanted, dx = (torch.autograd.grad(y, x, dy)[0] for y in ys)
    kit.assert_same_bits(dx, wanted)
    assert len(copied) == 1


@pytest.mark.parametrize(("operation", "strategy", "meaning"), IN_EIGHT_BITS)
def test_dx_of_a_head_keeps_what_small_probabilities_carry(operation, strategy, meaning):
    """Of rows whose small numbers only count together; against the base in fp64, unrounded."""
    tensors = operation.operands(Sizes(32, 32, 1008, 4), SINGLE)
    weight = tensors.pop("weight") + 0.5 * torch.randn(32)  # what rows have in common
    packed, dy = QuantizedWeight.quantize(weight), logits_gradient(32, 1008, 3.0)
    doubles = kit.in_dtype(tensors, torch.float64)
    truth = kit.outcome(
        lambda **a: operation.reference(weight=packed, **a), doubles, trained(operation), dy
    )

    def errors(end: str) -> list[float]:
        run = forced(operation, f"{strategy}_{end}", packed, "triton")
        dx = kit.outcome(run, tensors, ["x"], dy)["x"].double()
        pairs = ((dx, truth["x"]), (dx.sum(0), truth["x"].sum(0)))
        return [((got - wanted).norm() / wanted.norm()).item() for got, wanted in pairs]

    careless, careful = errors("int8"), errors("int8_logits")
    assert max(careful) < 0.03
    assert all(2 * good < bad for good, bad in zip(careful, careless, strict=True))


@pytest.mark.parametrize("rows", [0, 1, 70])
def test_the_bare_product_of_a_head(rows):
    """What "auto" takes, through the public function; y is that of any other weight."""
    weight = QuantizedWeight.quantize(torch.randn(200, 64) + torch.randn(64), makes_logits=True)
    x, dy = torch.randn(rows, 64, requires_grad=True), logits_gradient(rows, 200, 3.0)
    y, wanted = (quantized_linear(x, weight, impl=impl) for impl in ("triton", "reference"))
    assert torch.equal(y, quantized_linear(x, replace(weight, makes_logits=False), impl="triton"))
    dx, wanted_dx = (torch.autograd.grad(one, x, dy)[0].sum(0) for one in (y, wanted))
    assert (dx - wanted_dx).norm() <= 0.05 * wanted_dx.norm()


@pytest.mark.parametrize(
    "strategy", ["split_weight_only", "split_int8", "split_fp8", "split_dense"]
)
def test_dropout_is_that_of_the_eager_path(strategy):
    """In dX the mask falls on the low-rank term alone."""
    format = "fp8" if strategy.endswith("fp8") else "int8"
    tensors, packed = operands(LORA, Sizes(33, 64, 48, 8), SINGLE, format)
    dy, seed = torch.randn(33, 48), torch.tensor([7])

    def run(impl, strategy):
        def call(x, lora_a, lora_b, bias, scale):
            return torch.ops.artemis.lora_linear(
                x, packed.data, lora_a, lora_b, bias, 1.0, scale, 0.4, seed, impl, strategy,
                packed.scale, packed.offset,
            )  # fmt: skip

        return kit.outcome(call, tensors, trained(LORA), dy)

    in_eight_bits = strategy.endswith(("int8", "fp8"))
    wanted = run("eager", f"addmm_{format}" if in_eight_bits else "addmm_weight_only")
    for name, value in run("triton", strategy).items():
        error = (value - wanted[name]).norm() / wanted[name].norm()
        assert error < 2e-3, f"{name}: {error:.2g}"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_public_functions(rows, format):
    """What `impl="triton"` chooses, leading dimensions, no rows; and the bare product."""
    weight = QuantizedWeight.quantize(torch.randn(48, 64), format)
    x = torch.randn(2, rows, 64, requires_grad=True)
    a, b, bias = torch.randn(4, 64), torch.randn(48, 4), torch.randn(48)
    for call in (
        lambda impl: artemis_kernels.lora_linear(x, weight, a, b, 0.5, bias=bias, impl=impl),
        lambda impl: artemis_kernels.adapter_linear(
            x, weight, b.t(), b, bias=bias, scale=0.1, impl=impl
        ),
        lambda impl: quantized_linear(x, weight, bias=bias, impl=impl),
    ):
        y, wanted = call("triton"), call("reference")
        assert y.shape == wanted.shape
        dx, wanted_dx = (torch.autograd.grad(one.square().sum(), x)[0] for one in (y, wanted))
        if rows:
            assert (y - wanted).norm() < 0.04 * wanted.norm()
            assert (dx - wanted_dx).norm() < 0.1 * wanted_dx.norm()


def test_the_operators_are_whole_to_torch():
    tensors, packed = operands(LORA, Sizes(17, 32, 16, 4), SINGLE)
    for strategy in ("split_weight_only", "split_int8"):
        arguments = (
            tensors["x"].requires_grad_(), packed.data, tensors["lora_a"], tensors["lora_b"], None,
            1.0, None, 0.0, None, "triton", strategy, packed.scale, None,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.artemis.lora_linear.default, arguments)
    bare = (tensors["x"], packed.data, None, "triton", "product_int8", packed.scale, None)
    torch.library.opcheck(torch.ops.artemis.quantized_linear.default, bare)


def chosen(
    chip: str, rows: int, format: str, bits="auto", dtype=BF16, k=4096, makes_logits=False
) -> tuple[str, bool]:
    weight = QuantizedWeight.quantize(
        torch.ones(16, k), format, activation_bits=bits, makes_logits=makes_logits
    )
    how, vendor, reason = packed_choice.choose(weight, Shape(rows, 16, k, 8, dtype), CHIPS[chip])
    assert reason and not reason.endswith(".") and "\n" not in reason
    return how, vendor


def test_folding_counts_the_copies_of_a_packed_weight():
    """Of a gate, on an H200; over a tensor 2,048 rows are enough (tests/core/test_tuning.py)."""
    with torch.device("meta"):
        weight = QuantizedWeight(
            torch.empty(11008, 4096, dtype=torch.float8_e4m3fn), torch.empty(11008), None, "fp8",
            None,
        )  # fmt: skip
    wanted = {2048: "plain_vendor_fp8", 8192: "folded_vendor_fp8"}
    for rows, strategy in wanted.items():
        found = packed_choice.adapter_strategy(weight, rows, 64, True, BF16, CHIPS["sm_90"])
        assert found[0] == strategy


def test_fp8_sums_are_kept_precise_where_they_are_long_and_in_dx(monkeypatch):
    asked = []

    def product(q, w, row, column, *, out_dtype, use_fast_accum):
        asked.append((q.shape[1], use_fast_accum))
        return (q.float() @ w.float() * row * column).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    for k in (64, steps._LONG_SUM + 16):
        weight = QuantizedWeight.quantize(torch.randn(32, k), "fp8", activation_bits=8)
        packed = steps.Packed(weight, "fp8", vendor=True)
        steps.product(torch.randn(2, k), packed, None, CHIPS["interpreter"])
    steps.product(torch.randn(2, 32), packed.t(), None, CHIPS["interpreter"])
    assert asked == [(64, True), (steps._LONG_SUM + 16, False), (32, False)]


def test_choices():
    assert chosen("sm_90", 1, "int8") == chosen("sm_90", 64, "int4") == ("weight_only", False)
    assert chosen("sm_90", 4096, "int8") == ("int8", False)
    assert chosen("sm_90", 4096, "fp8") == ("fp8", True)
    assert chosen("sm_90", 4096, "fp8", k=2048) == ("fp8", False)
    assert chosen("sm_90", 4096, "fp8", dtype=HALF) == ("fp8", False)
    assert chosen("sm_90", 4096, "fp8", k=14330) == ("fp8", False)
    assert (
        chosen("sm_90", 4096, "int8", bits=16) == chosen("sm_80", 4096, "fp8") == ("dense", False)
    )
    assert chosen("sm_80", 100, "fp8", bits=8) == ("weight_only", False)
    assert chosen("sm_90", 240, "int4") == ("weight_only", False)
    assert chosen("sm_90", 4096, "int4") == ("dense", False)
    assert (
        chosen("gfx942", 4096, "fp8")[0] == "dense" and chosen("gfx942", 4096, "int8")[0] == "int8"
    )
    assert chosen("sm_90", 1, "fp8", bits=8)[0] == "fp8"


@pytest.mark.parametrize("rows", [1, 100, 4096])
def test_eight_bits_that_the_chip_cannot_do_are_told(rows):
    weight = QuantizedWeight.quantize(torch.ones(16, 64), "fp8", activation_bits=8)
    how, _, reason = packed_choice.choose(weight, Shape(rows, 16, 64, 8, BF16), CHIPS["sm_80"])
    assert how in ("weight_only", "dense")
    assert reason.startswith("activation_bits is 8, but sm_80 has no e4m3 tensor cores, and ")


def test_choices_for_a_head():
    """int8 as for any other weight; e4m3 only where it is asked for, since it takes no care."""
    assert chosen("sm_90", 4096, "int8", makes_logits=True) == ("int8", False)
    assert chosen("sm_90", 64, "int8", makes_logits=True) == ("weight_only", False)
    assert chosen("sm_90", 4096, "fp8", makes_logits=True) == ("dense", False)
    assert chosen("sm_90", 4096, "fp8", bits=8, makes_logits=True) == ("fp8", True)


def test_explain_says_how():
    x, a, b = torch.randn(70, 64), torch.randn(4, 64), torch.randn(48, 4)
    weight = QuantizedWeight.quantize(torch.randn(48, 64))
    many = explain("lora_linear", x, weight, a, b, 1.0, impl="triton")
    assert (many.impl, many.strategy) == ("triton", "split_int8") and "tensor cores" in many.reason
    down, up = torch.randn(64, 48), torch.randn(48, 64)
    few = explain("adapter_linear", x[:3], weight, down, up, impl="triton")
    assert few.strategy == "plain_weight_only" and "few rows" in few.reason
    bare = explain("quantized_linear", x[:3], weight, impl="triton")
    assert bare.strategy == "product_weight_only"
    head = replace(weight, makes_logits=True)
    assert explain("lora_linear", x, head, a, b, 1.0, impl="triton").strategy == "split_int8_logits"
    assert explain("quantized_linear", x, head, impl="triton").strategy == "product_int8_logits"
    head = replace(head, activation_bits=16)
    assert explain("quantized_linear", x, head, impl="triton").strategy == "product_dense"
