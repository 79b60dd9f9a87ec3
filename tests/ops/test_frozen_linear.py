"""`frozen_linear`: prepared constants compute what the adapted layer computes."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.functional import linear

from artemis_kernels import (
    FrozenAdapter,
    FrozenLinear,
    QuantizedWeight,
    Unavailable,
    adapter_linear,
    explain,
    frozen_linear,
    lora_linear,
)
from artemis_kernels.core import frozen, native
from artemis_kernels.core.native import Native
from tests import kit
from tests.ops.operations import INTERPRETED

FORMATS = (None, "int8", "fp8", "int4")
SINGLE, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
SHAPES = {"wide": (64, 136), "narrow": (192, 33), "ragged": (80, 50)}  # in, out


def layer(k: int, n: int, format: str | None, dtype: torch.dtype, m: int = 3):
    """x, the weight as a layer holds it and as a tensor, and all adapter tensors, balanced."""
    shapes = {
        "x": (m, k), "weight": (n, k), "bias": (n,), "lora_a": (5, k), "lora_b": (n, 5),
        "down": (35, n), "up": (n, 35), "bias_down": (35,), "bias_up": (n,),
    }  # fmt: skip
    tensors = kit.operands(shapes, torch.float32)
    weight = tensors.pop("weight")
    if format is None:
        held = weight.to(dtype)
        exact = held.double()
    else:
        size = {"group_size": 64 if k % 64 == 0 else 16} if format == "int4" else {}
        held = QuantizedWeight.quantize(weight, format, activation_bits=16, **size)
        exact = held.dequantize(torch.float64)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}, held, exact


def picked(tensors, *names):
    return {name: tensors[name] for name in names}


BOTTLENECK = ("bias", "bias_down", "bias_up")


def both(op, x, exact, dtype, *matrices, **options):
    """Plain torch's result in fp64 and in `dtype`."""

    def cast(to):
        arguments = [t.to(to) for t in (x, exact, *matrices)]
        other = {k: v.to(to) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        return op(*arguments, impl="reference", **other)

    return cast(torch.float64), cast(dtype)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("rows", [1, 3, 8, 13, 40])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [SINGLE, BF16], ids=str)
def test_a_bottleneck(dtype, format, shape, rows, activation):
    tensors, held, exact = layer(*shape, format, dtype, rows)
    options = picked(tensors, *BOTTLENECK) | {"scale": 0.7, "activation": activation}
    matrices = tensors["down"], tensors["up"]
    adapter = FrozenAdapter.bottleneck(held, *matrices, **options)
    assert adapter.reads_output == (shape[0] >= shape[1])
    y = frozen_linear(tensors["x"], held, adapter)
    truth, plain = both(adapter_linear, tensors["x"], exact, dtype, *matrices, **options)
    # F is rounded once, like y0 of the plain formula: each may be the lucky one.
    kit.assert_accurate(y, truth, plain, dtype, c=2.0)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [SINGLE, BF16], ids=str)
def test_lora(dtype, format, shape, rows, biased):
    tensors, held, exact = layer(*shape, format, dtype, rows)
    options = picked(tensors, "bias") if biased else {}
    matrices = tensors["lora_a"], tensors["lora_b"]
    adapter = FrozenAdapter.lora(*matrices, torch.tensor(0.7), **options)
    y = frozen_linear(tensors["x"], held, adapter)
    truth, plain = both(lora_linear, tensors["x"], exact, dtype, *matrices, scale=0.7, **options)
    kit.assert_accurate(y, truth, plain, dtype, c=1.25)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("absent", [(), ("bias",), ("bias_up",), BOTTLENECK], ids=str)
@pytest.mark.parametrize("shape", [SHAPES["wide"], SHAPES["narrow"]], ids=["folds", "reads y"])
def test_each_bias_may_be_absent(shape, absent, format):
    """In fp32, where an error of a small term shows."""
    tensors, held, exact = layer(*shape, format, SINGLE)
    options = picked(tensors, *(name for name in BOTTLENECK if name not in absent))
    matrices = tensors["down"], tensors["up"]
    adapter = FrozenAdapter.bottleneck(held, *matrices, scale=0.3, **options)
    y = frozen_linear(tensors["x"], held, adapter)
    truth, _ = both(adapter_linear, tensors["x"], exact, SINGLE, *matrices, scale=0.3, **options)
    torch.testing.assert_close(y.double(), truth, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("activation", kit.ACTIVATIONS)
@pytest.mark.parametrize("reads_output", [True, False])
@pytest.mark.parametrize("format", [None, "int8"])
def test_few_rows_in_one_pass(format, reads_output, activation):
    """The compiled pass against the meaning, the adapter alone: no base hides it."""
    tensors, held, exact = layer(64, 40, format, BF16, 5)
    read = 40 if reads_output else 64
    down, up = torch.randn(9, read).bfloat16() / read**0.5, torch.randn(40, 9).bfloat16()
    adapter = FrozenAdapter(
        down, up, tensors["bias"], torch.randn(9).bfloat16(), 0.5, activation, reads_output
    )
    if not frozen.most_few_rows(BF16, down.device, held):
        pytest.skip("no compiled pass here")
    x = tensors["x"]
    y = frozen.FewRows(held, adapter)(x)
    wide = FrozenAdapter(
        down.double(), up.double(), tensors["bias"].double(), adapter.bias_down.double(), 0.5,
        activation, reads_output,
    )  # fmt: skip
    truth = frozen_linear(x.double(), exact, wide, impl="reference")
    base = x.double() @ exact.t() + tensors["bias"].double()
    # y rounded once (2⁻⁹ of it), h once and, where it is read, y1 once.
    error = (y.double() - truth).abs().max() / truth.abs().max()
    assert error < 0.02 and (truth - base).abs().max() > 0.5, error


@pytest.mark.parametrize("out_features", [1, 3, 6, 41])
@pytest.mark.parametrize("in_features", [1, 7, 33, 65, 255, 257, 1000])
@pytest.mark.parametrize("format", [None, "int8", "fp8"])
def test_a_row_of_any_width(format, in_features, out_features):
    """Every column counts, to the last: the one row's own loops over it, of each format."""
    tensors, held, exact = layer(in_features, out_features, format, BF16, 1)
    adapter = FrozenAdapter.lora(tensors["lora_a"], tensors["lora_b"] * 0)
    x = tensors["x"].double()
    difference = frozen_linear(tensors["x"], held, adapter).double() - x @ exact.t()
    # y is rounded once; fixed point keeps 15 bits of a block's largest, a sum fp32's 24 bits.
    allowed = 2.0**-8 * (x @ exact.t()).abs() + 2.0**-13 * (x.abs() @ exact.abs().t())
    assert (difference.abs() <= allowed).all()


@INTERPRETED
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["lora", "folds", "reads y"])
def test_the_kernels(kind, format, dtype):
    tensors, held, exact = layer(64, 40, format, dtype, 20)
    if kind == "lora":
        matrices, options = (tensors["lora_a"], tensors["lora_b"]), picked(tensors, "bias")
        adapter = FrozenAdapter.lora(*matrices, 0.7, **options)
        op = lora_linear
    else:
        matrices, options = (tensors["down"], tensors["up"]), picked(tensors, *BOTTLENECK)
        adapter = folded(held, matrices, options, dtype, kind == "folds")
        op = adapter_linear
    y = frozen_linear(tensors["x"], held, adapter, impl="triton")
    truth, plain = both(op, tensors["x"], exact, dtype, *matrices, scale=0.7, **options)
    kit.assert_accurate(y, truth, plain, dtype, c=2.0)


def folded(weight, matrices, options, dtype, folds: bool) -> FrozenAdapter:
    """Either form of a bottleneck, whatever a CPU prefers for the shape."""
    down, up = (t.double() for t in matrices)
    bias, bias_down, bias_up = (options[name].double() for name in BOTTLENECK)
    exact = weight.double() if isinstance(weight, torch.Tensor) else weight.dequantize(down.dtype)
    total, inner = bias + 0.7 * bias_up, bias_down - 0.7 * down @ bias_up
    if folds:
        inner, down = bias_down + down @ bias, down @ exact
    constants = (t.to(dtype) for t in (down, up, total, inner))
    return FrozenAdapter(*constants, 0.7, "gelu", not folds)


@INTERPRETED
@pytest.mark.parametrize(
    "kind, allowed", [("lora", 1), ("folds", 3)], ids=["lora: one pass", "bottleneck: shrink twice"]
)
def test_launches_at_few_rows(kind, allowed, monkeypatch):
    """A layer of a Llama has four LoRA modules and three bottlenecks: 7 products and 6 more."""
    from artemis_kernels.ops.low_rank import expand, one_pass, shrink

    launched = []
    for module, name in (
        (one_pass, "_one_pass"), (shrink, "_shrink"), (shrink, "_finish"), (expand, "_expand")
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Counted(getattr(module, name), name, launched))
    tensors, held, _ = layer(512, 40, None, SINGLE, 5)
    if kind == "lora":
        adapter = FrozenAdapter.lora(tensors["lora_a"], tensors["lora_b"], 0.7)
    else:
        matrices, options = (tensors["down"], tensors["up"]), picked(tensors, *BOTTLENECK)
        adapter = folded(held, matrices, options, SINGLE, True)
    frozen_linear(tensors["x"], held, adapter, impl="triton")
    assert 1 <= len(launched) <= allowed, launched


@INTERPRETED
@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("kind", ["lora", "folds"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_few_rows_take_two_launches(format, kind, rows, launched):
    """Over a weight of any kind, and nothing is rounded but the hidden units and y."""
    tensors, held, exact = layer(528, 41, format, HALF, rows)
    if kind == "lora":
        matrices, options = (tensors["lora_a"], tensors["lora_b"]), picked(tensors, "bias")
        adapter, op = FrozenAdapter.lora(*matrices, 0.7, **options), lora_linear
    else:
        matrices, options = (tensors["down"], tensors["up"]), picked(tensors, *BOTTLENECK)
        adapter, op = folded(held, matrices, options, HALF, True), adapter_linear
    y = frozen_linear(tensors["x"], held, adapter, impl="triton")
    assert launched == ["_shrink_rows", "_matvec"]
    truth, plain = both(op, tensors["x"], exact, HALF, *matrices, scale=0.7, **options)
    kit.assert_accurate(y, truth, plain, HALF, c=2.0)


@INTERPRETED
@pytest.mark.parametrize("kind", ["lora", "folds", "reads y"])
@pytest.mark.parametrize("format", FORMATS)
def test_an_object_takes_the_kernels_of_a_call(format, kind):
    """For any rows and any x, from what the tensors are by then."""
    tensors, held, _ = layer(528, 41, format, HALF, 6)
    if kind == "lora":
        adapter = FrozenAdapter.lora(tensors["lora_a"], tensors["lora_b"], 0.7)
    else:
        matrices, options = (tensors["down"], tensors["up"]), picked(tensors, *BOTTLENECK)
        adapter = folded(held, matrices, options, HALF, kind == "folds")
    made = FrozenLinear(held, adapter, impl="triton")
    for rows in (1, 1, 4, 5, 2):
        x = torch.randn(rows, 528).to(HALF)
        kit.assert_same_bits(made(x), frozen_linear(x, held, adapter, impl="triton"))
        adapter.up.mul_(-2)
        numbers = held if format is None else held.data
        numbers.data = numbers.flip(0)
        kit.assert_same_bits(made(x), frozen_linear(x, held, adapter, impl="triton"))
    x = torch.randn(528, 2).to(HALF).t()  # by columns
    kit.assert_same_bits(made(x), frozen_linear(x, held, adapter, impl="triton"))


class Counted:
    """A kernel that notes its launches."""

    def __init__(self, kernel, name: str, launched: list):
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid):
        self.launched.append(self.name)
        return self.kernel[grid]


def test_layouts_and_leading_dimensions():
    tensors, held, _ = layer(64, 136, None, BF16, 6)
    adapter = FrozenAdapter.lora(tensors["lora_a"], tensors["lora_b"], 0.5)
    wanted = frozen_linear(tensors["x"], held, adapter)
    kit.assert_same_bits(
        frozen_linear(tensors["x"].view(2, 3, 64), held, adapter), wanted.view(2, 3, 136)
    )
    for change in kit.LAYOUTS:
        kit.assert_same_bits(frozen_linear(change(tensors["x"]), held, adapter), wanted)
        y = frozen_linear(tensors["x"], change(held), adapter)
        torch.testing.assert_close(y, wanted, rtol=0.02, atol=0.02)
    assert frozen_linear(tensors["x"][:0], held, adapter).shape == (0, 136)


@pytest.mark.parametrize("fill", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(fill):
    tensors, held, _ = layer(64, 136, "int8", BF16, 3)
    adapter = FrozenAdapter.lora(tensors["lora_a"], tensors["lora_b"], 0.5)
    clean = frozen_linear(tensors["x"], held, adapter)
    tensors["x"][1, 5] = fill
    y = frozen_linear(tensors["x"], held, adapter)
    assert not torch.isfinite(y[1]).any()
    kit.assert_same_bits(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("factor", [1.0, 30.0, 1e4])
def test_features_that_stand_out(factor, format):
    """A row in fixed point must not lose the others: here the large ones meet weights of zero."""
    tensors, held, _ = layer(640, 40, None, BF16, 1)
    held[:, ::100] = 0
    held = QuantizedWeight.quantize(
        held, format, **({"group_size": 64} if format == "int4" else {})
    )
    tensors["x"][:, ::100] = factor
    adapter = FrozenAdapter.lora(tensors["lora_a"] * 0, tensors["lora_b"])
    y = frozen_linear(tensors["x"], held, adapter)
    exact = held.dequantize(torch.float64)
    truth, plain = tensors["x"].double() @ exact.t(), tensors["x"] @ exact.bfloat16().t()
    kit.assert_accurate(y, truth, plain, BF16, c=1.25)


def test_under_autocast():
    tensors, held, _ = layer(64, 136, "int8", BF16, 3)
    adapter = FrozenAdapter.lora(tensors["lora_a"], tensors["lora_b"], 0.5)
    wanted = frozen_linear(tensors["x"], held, adapter)
    with torch.autocast("cpu", torch.bfloat16):
        kit.assert_same_bits(frozen_linear(tensors["x"].float(), held, adapter), wanted)


@pytest.mark.parametrize("rows", [3, 20])
def test_autocast_casts_a_weight_in_fp32(rows):
    tensors, weight, _ = layer(64, 136, None, SINGLE, rows)
    matrices = (tensors[name].bfloat16() for name in ("lora_a", "lora_b"))
    adapter, x = FrozenAdapter.lora(*matrices, 0.5), tensors["x"]
    wanted = frozen_linear(x.bfloat16(), weight.bfloat16(), adapter)
    with torch.autocast("cpu", torch.bfloat16):
        kit.assert_same_bits(frozen_linear(x, weight, adapter), wanted)


@pytest.mark.parametrize("format", [None, "int8"])
def test_compiles_whole_and_passes_opcheck(format):
    tensors, held, _ = layer(64, 136, format, BF16, 3)
    adapter = FrozenAdapter.lora(tensors["lora_a"], tensors["lora_b"], 0.5)
    step = torch.compile(
        lambda x: frozen_linear(x, held, adapter), fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        kit.assert_same_bits(step(tensors["x"]), frozen_linear(tensors["x"], held, adapter))
    data, *quantizers = (held,) if format is None else (held.data, held.scale, held.offset)
    strategy = explain(frozen_linear, tensors["x"], held, adapter).strategy
    torch.library.opcheck(
        torch.ops.artemis.frozen_linear.default,
        (tensors["x"], data, adapter.down, adapter.up, None, None, 0.5, None, "identity", False,
         "eager", strategy, *quantizers),
    )  # fmt: skip


def test_refusals():
    tensors, held, _ = layer(64, 136, None, SINGLE)
    x, adapter = tensors["x"], FrozenAdapter.lora(tensors["lora_a"], tensors["lora_b"])
    with pytest.raises(TypeError, match="adapter must be a FrozenAdapter, got Tensor"):
        frozen_linear(x, held, tensors["lora_a"])
    with pytest.raises(ValueError, match=r"adapter.up must have shape \(20, 5\)"):
        frozen_linear(x, held[:20], adapter)
    with pytest.raises(TypeError, match="adapter is torch.float32, but x is torch.bfloat16"):
        frozen_linear(x.bfloat16(), held.bfloat16(), adapter)
    with pytest.raises(ValueError, match="x requires a gradient, and there is none here"):
        frozen_linear(x.clone().requires_grad_(), held, adapter)
    with pytest.raises(ValueError, match="weight requires a gradient"):
        frozen_linear(x, held.clone().requires_grad_(), adapter)
    learning = FrozenAdapter(adapter.down, adapter.up.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"adapter\.up requires a gradient"):
        frozen_linear(x, held, learning)
    narrow = FrozenAdapter.lora(tensors["lora_a"], tensors["lora_b"], dtype=BF16)
    with pytest.raises(TypeError, match="weight is torch.float32, but x is torch.bfloat16"):
        FrozenLinear(held, narrow)


@pytest.mark.parametrize("name", ["up", "bias", "bias_down"])
def test_constants_are_of_one_dtype(name):
    tensors, held, _ = layer(64, 136, None, BF16)
    constants = {"bias": tensors["bias"], "bias_down": tensors["lora_a"][:, 0]}
    adapter = FrozenAdapter(tensors["lora_a"], tensors["lora_b"], **constants)
    mixed = replace(adapter, **{name: getattr(adapter, name).float()})
    for refused in (
        lambda: FrozenLinear(held, mixed),
        lambda: frozen_linear(tensors["x"], held, mixed),
    ):
        with pytest.raises(TypeError, match=rf"adapter\.{name} is torch.float32, but adapter.down"):
            refused()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 9, 30])
def test_as_an_object(rows, format):
    """The same bits; addresses outlive the tensors that they were taken from."""
    tensors, held, _ = layer(64, 136, format, BF16, rows)
    adapter = FrozenAdapter.bottleneck(
        held, tensors["down"], tensors["up"], **picked(tensors, *BOTTLENECK)
    )
    wanted = frozen_linear(tensors["x"], held, adapter)
    linear = FrozenLinear(held, adapter)
    for part in (held,) if format is None else (held.data, held.scale):
        part.data = part.data.clone()
    kit.assert_same_bits(linear(tensors["x"][None]), wanted[None])
    with pytest.raises(ValueError, match="weight must have shape"):
        linear(tensors["x"][:, :10])
    with pytest.raises(ValueError, match="requires a gradient"):
        linear(tensors["x"].clone().requires_grad_())


@pytest.mark.parametrize("asking", ["weight", "down", "up", "bias", "bias_down", "scale"])
@pytest.mark.parametrize("rows", [1, 30])
def test_an_object_refuses_what_asks_for_a_gradient(rows, asking):
    """At few rows too, where one pass serves the call; without gradients it computes."""
    tensors, held, _ = layer(64, 136, None, BF16, rows)
    constants = {"bias": tensors["bias"], "bias_down": tensors["lora_a"][:, 0].clone()}
    constants["scale"] = torch.tensor(0.5)
    adapter = FrozenAdapter(tensors["lora_a"], tensors["lora_b"], **constants)
    linear = FrozenLinear(held, adapter)
    wanted = linear(tensors["x"])
    (held if asking == "weight" else getattr(adapter, asking)).requires_grad_()
    with pytest.raises(ValueError, match=f"{asking} requires a gradient"):
        linear(tensors["x"])
    with torch.no_grad():
        kit.assert_same_bits(linear(tensors["x"]), wanted)


def test_a_call_of_another_thread_in_between(monkeypatch):
    """It sets what was planned, for 3 rows, which read the weight as it is: 20 are rounded."""
    tensors, held, _ = layer(64, 136, "int8", SINGLE, 20)
    held = replace(held, activation_bits="auto")
    adapter, others, planned = FrozenAdapter.none(held, dtype=SINGLE), [], []

    def read(linear):
        found = planned[-1]
        if others:
            linear(others.pop())
        return found

    kept = property(read, lambda linear, value: planned.append(value))
    monkeypatch.setattr(FrozenLinear, "_planned", kept, raising=False)
    made, x = FrozenLinear(held, adapter), tensors["x"]
    wanted = made(x)
    others.append(x[:3])
    kit.assert_same_bits(made(x), wanted)
    assert planned[-1][0] == 3


def saved(made: FrozenLinear) -> FrozenLinear:
    """By torch's pickles: plain ones hold no e4m3."""
    torch.save(made, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, saved])
@pytest.mark.parametrize("format", FORMATS)
def test_copies(format, copied):
    """The same bits, by tensors of its own but for a shallow copy."""
    tensors, held, _ = layer(64, 136, format, BF16, 20)
    adapter = FrozenAdapter.lora(tensors["lora_a"], tensors["lora_b"], 0.5, bias=tensors["bias"])
    made = FrozenLinear(held, adapter, impl="eager")
    wanted = [made(tensors["x"][:rows]) for rows in (1, 20)]
    other = copied(made)
    assert other.impl == "eager" and (other.adapter is adapter) == (copied is copy.copy)
    if copied is not copy.copy:
        adapter.up.zero_()
    for y in wanted:
        kit.assert_same_bits(other(tensors["x"][: len(y)]), y)


def test_a_pickle_is_read_where_nothing_is_compiled(monkeypatch):
    tensors, held, exact = layer(64, 136, "int8", BF16, 1)
    kept = pickle.dumps(FrozenLinear(held, FrozenAdapter.none(held, dtype=BF16)))
    monkeypatch.setattr(native, "library", lambda: Native(None, "switched off"))
    y, truth = pickle.loads(kept)(tensors["x"]).double(), linear(tensors["x"].double(), exact)
    assert (y - truth).norm() < 0.01 * truth.norm()


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("format", FORMATS)
def test_the_default_device_is_not_asked(format, rows):
    tensors, held, _ = layer(64, 136, format, BF16, rows)
    adapter = FrozenAdapter.lora(tensors["lora_a"], tensors["lora_b"], 0.5)
    wanted = frozen_linear(tensors["x"], held, adapter)
    with torch.device("meta"):
        kit.assert_same_bits(FrozenLinear(held, adapter)(tensors["x"]), wanted)


@pytest.mark.parametrize("format", FORMATS)
def test_a_storage_that_moves(format):
    """`share_memory_` frees what a tensor's address was; others' numbers are there soon."""
    tensors, held, _ = layer(64, 136, format, BF16, 3)
    adapter = FrozenAdapter.lora(tensors["lora_a"], tensors["lora_b"], 0.5)
    frozen_layer = FrozenLinear(held, adapter)
    wanted = frozen_layer(tensors["x"])
    of_weight = (held,) if format is None else (held.data, held.scale)
    moved = (*of_weight, adapter.down, adapter.up)
    for tensor in moved:
        tensor.share_memory_()
    others = [torch.full((t.nbytes,), 0x7F, dtype=torch.uint8) for t in moved for _ in range(4)]
    kit.assert_same_bits(frozen_layer(tensors["x"]), wanted)
    assert others


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [SINGLE, BF16], ids=str)
def test_without_an_adapter(dtype, format, shape, biased):
    for rows in range(1, 18):
        tensors, held, exact = layer(*shape, format, dtype, rows)
        x, bias = tensors["x"], tensors["bias"] if biased else None
        adapter = FrozenAdapter.none(held, bias=bias, dtype=dtype)
        assert adapter.rank == 0
        y = frozen_linear(x, held, adapter)
        kit.assert_same_bits(FrozenLinear(held, adapter)(x), y)
        truth = linear(x.double(), exact, bias if bias is None else bias.double())
        kit.assert_accurate(y, truth, linear(x, exact.to(dtype), bias), dtype, c=1.25)


@INTERPRETED
@pytest.mark.parametrize("format", FORMATS)
def test_the_kernels_without_an_adapter(format):
    tensors, held, exact = layer(64, 40, format, SINGLE, 20)
    adapter = FrozenAdapter.none(held, bias=tensors["bias"], dtype=SINGLE)
    y = frozen_linear(tensors["x"], held, adapter, impl="triton")
    truth = linear(tensors["x"].double(), exact, tensors["bias"].double())
    plain = linear(tensors["x"], exact.float(), tensors["bias"])
    kit.assert_accurate(y, truth, plain, SINGLE, c=2.0)


def test_explained():
    tensors, held, _ = layer(64, 136, "int8", BF16, 3)
    adapter = FrozenAdapter.bottleneck(held, tensors["down"], tensors["up"])
    choice = explain("frozen_linear", tensors["x"], held, adapter)
    assert choice.strategy in ("one_call_weight_only", "products_weight_only")
    assert choice.cost.flops == 2 * 3 * 64 * 136 + 2 * 3 * 35 * (64 + 136)


def test_groups_that_the_pass_of_few_rows_does_not_take():
    """A strategy that a graph was traced with is no promise; asked for itself the pass says no."""
    tensors, held, exact = layer(96, 40, "int4", BF16, 2)
    adapter = FrozenAdapter.none(held, dtype=BF16)
    with pytest.raises(Unavailable, match="takes this weight"):
        frozen.FewRows(held, adapter)
    y = torch.ops.artemis.frozen_linear(
        tensors["x"], held.data, adapter.down, adapter.up, None, None, 1.0, None, "identity", False,
        "eager", "one_call_weight_only", held.scale, held.offset,
    )  # fmt: skip
    truth = tensors["x"].double() @ exact.t()
    kit.assert_accurate(y, truth, tensors["x"] @ exact.bfloat16().t(), BF16, c=1.25)


@pytest.mark.parametrize("dtype", [SINGLE, BF16], ids=str)
@pytest.mark.parametrize("format", [None, "int8"])
@pytest.mark.parametrize("dual", ["x", "down", "scale"])
def test_a_tangent_is_never_lost(dual, format, dtype):
    tensors, held, _ = layer(64, 40, format, dtype, 3)
    adapter = FrozenAdapter.lora(tensors["lora_a"], tensors["lora_b"], 0.5)
    x = tensors["x"]
    calls = (lambda x, a: FrozenLinear(held, a)(x), lambda x, a: frozen_linear(x, held, a))
    plain = FrozenLinear(held, adapter)
    with forward_ad.dual_level():
        if dual == "x":
            x = forward_ad.make_dual(x, torch.ones_like(x))
            calls = (*calls, lambda x, a: plain(x))
        else:
            start = adapter.down if dual == "down" else torch.tensor(0.5)
            start = forward_ad.make_dual(start, torch.ones_like(start))
            adapter = replace(adapter, **{dual: start})
        for call in calls:
            with pytest.raises(ValueError, match="has a tangent"):
                call(x, adapter)


@pytest.mark.parametrize("rows", [1, 3, 30])
@pytest.mark.parametrize("format", [None, "int8"])
def test_vmap(format, rows):
    tensors, held, _ = layer(64, 40, format, BF16, 4 * rows)
    adapter = FrozenAdapter.lora(tensors["lora_a"], tensors["lora_b"], 0.5)
    x = tensors["x"].view(4, rows, 64)
    for call in (FrozenLinear(held, adapter), lambda x: frozen_linear(x, held, adapter)):
        kit.assert_same_bits(torch.vmap(call)(x), torch.stack([call(one) for one in x]))
