"""Operations over a quantized weight: by the accuracy rule, and with the rounding told.

In 8 bits the truth is computed in fp64 with x and dY rounded as docs/quantization.md says, so
that what is left is the arithmetic: a wrong scale, a missing column or a dropped dX has no cover.
"""

import pytest
import torch

import artemis_kernels
from artemis_kernels import QuantizedWeight, Unavailable, explain
from artemis_kernels.core import eight_bit, native
from artemis_kernels.core.native import Native
from tests import kit
from tests.kit import Sizes
from tests.ops.operations import ADAPTER, BF16, DOUBLE, HALF, LORA, SINGLE
from tests.ops.packed import forced, operands, trained, truth_in_eight_bits

FORMATS = ("int8", "fp8", "int4")
STRATEGIES = [(LORA, "addmm"), (ADAPTER, "plain"), (ADAPTER, "folded")]
SIZES = [Sizes(1, 24, 17, 1), Sizes(2, 40, 32, 8), Sizes(3, 64, 48, 8), Sizes(130, 136, 20, 12)]
BACKEND = "aot_eager"


@pytest.mark.parametrize("dtype", [SINGLE, BF16, HALF], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("operation", "strategy"), STRATEGIES)
def test_weight_only_follows_the_dequantized_base(operation, strategy, format, sizes, dtype):
    tensors, packed = operands(operation, sizes, dtype, format)

    def reference(**arguments):
        return operation.reference(weight=packed, **arguments)

    few = sizes.m <= 2  # plain torch, the yardstick, may hit the truth of one row by luck
    kit.assert_follows_reference(
        forced(operation, f"{strategy}_weight_only", packed), reference, tensors,
        trained(operation), c=2.0 if few else 1.25,
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "limit"), [(SINGLE, 2e-4), (BF16, 0.012)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("way", ["compiled", "plain-torch"])
@pytest.mark.parametrize("sizes", [*SIZES, Sizes(65, 300, 130, 16)], ids=str)
@pytest.mark.parametrize(("operation", "strategy"), STRATEGIES)
def test_eight_bits(operation, strategy, sizes, way, dtype, limit, monkeypatch):
    """A code on the edge between two levels may fall either way: 1e-4 of a step or so, at most."""
    if way == "plain-torch":
        monkeypatch.setattr(native, "library", lambda: Native(None, "switched off"))
        monkeypatch.setattr(eight_bit, "multiplies_int8", lambda device: False)
    tensors, packed = operands(operation, sizes, dtype)
    if sizes.k > 200:
        tensors["x"][:, [7, 150]] *= 50
    dy = torch.randn(sizes.m, sizes.n).to(dtype)
    if sizes.k > 200:
        dy[:, 11] *= 50
    run = forced(operation, f"{strategy}_int8", packed)
    actual = kit.outcome(run, tensors, trained(operation), dy)
    truth = truth_in_eight_bits(operation, strategy, packed, tensors, dy)
    for name, wanted in truth.items():
        error = (actual[name].double() - wanted).norm() / wanted.norm()
        few = 4 if wanted.numel() < 100 else 1
        assert error < limit * few, f"{name}: {error:.2g}"


@pytest.mark.parametrize("dtype", [SINGLE, BF16], ids=str)
def test_adapter_gradients_of_lora_do_not_see_the_rounding(dtype):
    """dA, dB and dσ over an int8 base are those over the fp64 base, by the accuracy rule."""
    tensors, packed = operands(LORA, Sizes(130, 136, 70, 8), dtype)
    wanted = ["lora_a", "lora_b", "scale"]
    dense = packed.dequantize(dtype)
    dy = torch.randn(130, 70).to(dtype)
    actual = kit.outcome(forced(LORA, "addmm_int8", packed), tensors, wanted, dy)
    doubles = kit.in_dtype(tensors, DOUBLE)
    truth = kit.outcome(LORA.reference, doubles | {"weight": dense.double()}, wanted, dy)
    plain = kit.outcome(LORA.reference, tensors | {"weight": dense}, wanted, dy)
    for name in wanted:
        kit.assert_accurate(actual[name], truth[name], plain[name], dtype, c=1.25, name=name)


@pytest.mark.parametrize(("operation", "strategy"), STRATEGIES)
@pytest.mark.parametrize("product", ["int8", "weight_only"])
def test_hostile_layouts_and_no_rows(operation, strategy, product):
    tensors, packed = operands(operation, Sizes(40, 24, 16, 4), SINGLE)
    run = forced(operation, f"{strategy}_{product}", packed)
    dy = torch.randn(40, 16)
    wanted = kit.outcome(run, tensors, trained(operation), dy)
    wide = torch.randn(40, 49)
    wide[:, 1::2] = tensors["x"]
    layouts = {
        "sliced": tensors["x"].t().contiguous().t(),
        "offset": wide[:, 1::2],
    }
    for x in layouts.values():
        other = kit.outcome(run, tensors | {"x": x}, trained(operation), dy)
        for name, value in wanted.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-4)
    summed = kit.outcome(run, tensors, trained(operation), torch.ones(()).expand(40, 16))
    ones = kit.outcome(run, tensors, trained(operation), torch.ones(40, 16))
    for name, value in ones.items():
        torch.testing.assert_close(summed[name], value, rtol=1e-4, atol=1e-4)
    none = kit.outcome(run, tensors | {"x": tensors["x"][:0]}, trained(operation), dy[:0])
    assert none["y"].shape == (0, 16) and none["x"].shape == (0, 24)


@pytest.mark.parametrize(("operation", "strategy"), STRATEGIES)
def test_only_what_is_asked_for(operation, strategy):
    """Each parameter alone gets the gradient it gets among all."""
    tensors, packed = operands(operation, Sizes(40, 24, 16, 4), SINGLE)
    run = forced(operation, f"{strategy}_int8", packed)
    dy = torch.randn(40, 16)
    everything = kit.outcome(run, tensors, trained(operation), dy)
    for name in operation.trained:
        alone = kit.outcome(run, tensors, [name], dy)
        torch.testing.assert_close(alone[name], everything[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("operation", [LORA, ADAPTER], ids=str)
def test_public_function_autocast_and_leading_dimensions(operation, format):
    tensors, packed = operands(operation, Sizes(40, 64, 16, 4), SINGLE, format)
    tensors["x"] = tensors["x"].view(4, 10, 64)
    wanted = operation.reference(weight=packed, **tensors)
    plain = operation.public(weight=packed, **{"scale": 1.0} | tensors)
    assert plain.shape == (4, 10, 16) and plain.dtype == SINGLE
    assert (plain - wanted).norm() < 0.02 * wanted.norm()
    with torch.autocast("cpu", BF16):
        cast = operation.public(weight=packed, **tensors)
    assert cast.dtype == BF16
    assert (cast - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("operation", [LORA, ADAPTER], ids=str)
def test_inside_torchs_machinery(operation, format):
    """opcheck, and one graph without breaks, forward and backward, on every path."""
    tensors, packed = operands(operation, Sizes(40, 64, 16, 4), SINGLE, format)
    torch._dynamo.reset()
    for impl in (None, "reference"):

        def run(impl=impl, **arguments):
            return operation.public(weight=packed, impl=impl, **arguments) * 2

        compiled = torch.compile(run, fullgraph=True, backend=BACKEND)
        wanted = kit.outcome(run, tensors, trained(operation))
        kit.assert_same_outcome(kit.outcome(compiled, tensors, trained(operation)), wanted)
    torch._dynamo.reset()


@pytest.mark.parametrize("format", ["int8", "int4"])  # opcheck itself computes with its arguments
@pytest.mark.parametrize(("operation", "strategy"), STRATEGIES)
def test_opcheck(operation, strategy, format):
    tensors, packed = operands(operation, Sizes(40, 64, 16, 4), SINGLE, format)
    names = ("x", "lora_a", "lora_b", "bias") if operation is LORA else (
        "x", "down", "up", "bias", "bias_down", "bias_up"
    )  # fmt: skip
    first, *others = (tensors[name].requires_grad_() for name in names)
    kind = () if operation is LORA else ("gelu",)
    strategy += "_int8" if format == "int8" else "_weight_only"
    arguments = (
        first, packed.data, *others, 1.0, tensors["scale"].requires_grad_(), *kind, 0.0, None,
        "eager", strategy, packed.scale, packed.offset,
    )  # fmt: skip
    torch.library.opcheck(getattr(torch.ops.artemis, operation.name).default, arguments)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("operation", [LORA, ADAPTER], ids=str)
def test_shapes_and_dtypes_on_the_meta_device(operation, format):
    tensors, packed = operands(operation, Sizes(40, 64, 16, 4), BF16, format)
    wanted = kit.outcome(operation.public, tensors, trained(operation), weight=packed)
    leaves = {name: tensor.to("meta").requires_grad_() for name, tensor in tensors.items()}
    y = operation.public(weight=packed.to("meta"), **leaves)
    y.backward(torch.empty_like(y))
    got = {"y": y} | {name: leaves[name].grad for name in trained(operation)}
    for name, tensor in wanted.items():
        assert (got[name].shape, got[name].dtype) == (tensor.shape, tensor.dtype), name


def lora_call(rows: int, packed: QuantizedWeight) -> tuple:
    return torch.randn(rows, 64), packed, torch.randn(4, 64), torch.randn(16, 4), 1.0


def test_explain(monkeypatch):
    w = torch.randn(16, 64)
    auto = QuantizedWeight.quantize(w)
    monkeypatch.setattr("artemis_kernels.core.base.multiplies_int8", lambda device: True)
    many, few = (explain("lora_linear", *lora_call(rows, auto)) for rows in (16, 15))
    assert (many.impl, many.strategy) == ("eager", "addmm_int8")
    assert few.strategy == "addmm_weight_only" and "16 rows" in few.reason
    for bits, strategy in ((8, "addmm_int8"), (16, "addmm_weight_only")):
        packed = QuantizedWeight.quantize(w, activation_bits=bits)
        choice = explain("lora_linear", *lora_call(40, packed))
        assert choice.strategy == strategy and f"activation_bits is {bits}" in choice.reason
    four = explain("lora_linear", *lora_call(40, QuantizedWeight.quantize(w, "int4")))
    assert four.strategy == "addmm_weight_only" and "int4" in four.reason
    dense = explain("lora_linear", *lora_call(16, w))
    assert dense.cost.bytes - many.cost.bytes == w.nbytes - auto.nbytes
    monkeypatch.setattr("artemis_kernels.core.base.multiplies_int8", lambda device: False)
    without = explain("lora_linear", *lora_call(40, auto))
    assert without.strategy == "addmm_weight_only" and "no int8 dot product" in without.reason
    packed = QuantizedWeight.quantize(w, activation_bits=8)
    assert "in float32" in explain("lora_linear", *lora_call(40, packed)).reason


def test_refusals():
    packed = QuantizedWeight.quantize(torch.randn(16, 64))
    x, _, a, b, scale = lora_call(3, packed)
    with pytest.raises(Unavailable, match="float64"):
        artemis_kernels.lora_linear(
            x.double(), packed, a.double(), b.double(), scale, impl="triton"
        )
    with pytest.raises(ValueError, match=r"weight must have shape \(any, 63\), got \(16, 64\)"):
        artemis_kernels.lora_linear(x[:, :63], packed, a, b, scale)
    with pytest.raises(ValueError, match="lora_b must have shape"):
        artemis_kernels.lora_linear(x, packed, a, b[:15], scale)
    with pytest.raises(ValueError, match="weight is on meta"):
        artemis_kernels.lora_linear(x, packed.to("meta"), a, b, scale)


def test_sums_that_int32_may_not_hold_are_not_formed():
    """An output head of 133,145 rows: dX would add so many products."""
    for rows, strategy in ((133_144, "addmm_int8"), (133_145, "addmm_weight_only")):
        weight = QuantizedWeight.quantize(torch.ones(rows, 1), activation_bits=8)
        a, b = torch.ones(1, 1), torch.ones(rows, 1)
        assert explain("lora_linear", torch.ones(2, 1), weight, a, b, 1.0).strategy == strategy
