"""Weights in 8 and 4 bits: what they stand for, what they cost, what they refuse."""

import copy

import pytest
import torch

from artemis_kernels import QuantizedWeight
from artemis_kernels.core import four_bits, native, packed_passes
from artemis_kernels.core.native import Native

FORMATS = ("int8", "fp8", "int4")
SHAPES = [(1, 8), (3, 16), (17, 24), (64, 64), (5, 1032), (33, 2048)]  # (out, in)


@pytest.fixture(params=["compiled", "plain"])
def passes(request, monkeypatch):
    """With the compiled passes, and with plain torch only."""
    if request.param == "plain":
        monkeypatch.setattr(native, "library", lambda: Native(None, "switched off"))
    elif native.library().handle is None:
        pytest.skip(native.library().reason)


def meaning(weight: QuantizedWeight) -> torch.Tensor:
    """The weight in fp64, element by element from the table of the class's docstring."""
    out_features, in_features = weight.shape
    if weight.format != "int4":
        return weight.data.double() * weight.scale.double()[:, None]
    size = weight.group_size
    value = torch.empty(out_features, in_features, dtype=torch.float64)
    for k in range(in_features):
        group, within = divmod(k, size)
        byte = weight.data[:, group * size // 2 + within % (size // 2)]
        code = byte & 15 if within < size // 2 else byte >> 4
        value[:, k] = code * weight.scale[:, group].double() + weight.offset[:, group].double()
    return value


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_is_the_table_rounded_once(format, shape, passes):
    weight = QuantizedWeight.quantize(torch.randn(shape), format)
    assert weight.shape == shape
    truth = meaning(weight)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        actual = weight.dequantize(dtype)
        assert actual.dtype == dtype
        torch.testing.assert_close(
            actual.double(), truth, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-6
        )


@pytest.mark.parametrize("format", FORMATS)
def test_compiled_and_plain_agree_to_the_bit(format, monkeypatch):
    weight = QuantizedWeight.quantize(torch.randn(33, 2048), format)
    compiled = [weight.dequantize(dtype) for dtype in (torch.float32, torch.bfloat16)]
    monkeypatch.setattr(native, "library", lambda: Native(None, "switched off"))
    for before in compiled:
        assert torch.equal(before, weight.dequantize(before.dtype))


def every_fp8_number() -> QuantizedWeight:
    """One a row, behind zeros; of them two are nan."""
    codes = torch.zeros(256, 40, dtype=torch.uint8)
    codes[:, 33] = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    data = codes.view(torch.float8_e4m3fn)
    return QuantizedWeight(data, torch.full((256,), 0.5), None, "fp8", None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_fp8_number_is_read_back(dtype, passes):
    """The compiled conversion knows subnormals, both zeros, the largest number and nan."""
    weight = every_fp8_number()
    wanted = (weight.data.float() * 0.5).to(dtype)
    assert wanted.isnan().sum() == 2
    torch.testing.assert_close(weight.dequantize(dtype), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_fp8_number_meets_few_rows(dtype, rows):
    weight, x = every_fp8_number(), torch.zeros(rows, 40, dtype=dtype)
    x[:, 33] = torch.arange(1, rows + 1)
    y = packed_passes.few_rows(x, weight)
    if y is None:
        pytest.skip(native.library().reason)
    wanted = x.float() @ weight.data.float().t() * 0.5
    assert (wanted.isnan().sum(1) == 2).all()
    torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("format", "limit"), [("int8", 0.0085), ("fp8", 0.028), ("int4", 0.086)])
def test_error_of_a_normal_weight(format, limit):
    """Rounding noise alone: step/√12 for the integers, 2⁻⁴/√3 of a number at most for e4m3."""
    w = torch.randn(128, 512)
    assert relative_error(QuantizedWeight.quantize(w, format).dequantize(), w) < limit


@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "heavy-tailed"])
def test_search_beats_rounding_to_nearest_in_every_group(heavy):
    """Against the least and greatest weight as levels 0 and 15, in fp32."""
    w = torch.distributions.StudentT(4.0).sample((256, 64)) if heavy else torch.randn(256, 64)
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    step = (high - low) / 15
    nearest = ((w - low) / step).round() * step + low
    codes, scale, offset = four_bits.fit(w)
    found = codes * scale.float()[:, None] + offset.float()[:, None]
    ours, theirs = (found - w).square().sum(1), (nearest - w).square().sum(1)
    assert ours.sum() < 0.92 * theirs.sum()
    assert (ours <= 1.06 * theirs).all()  # bf16 steps


def test_importance_moves_the_error_to_columns_that_count_less():
    w, importance = torch.randn(64, 128), torch.ones(128)
    importance[::2] = 100.0
    plain = QuantizedWeight.quantize(w, "int4").dequantize() - w
    weighted = QuantizedWeight.quantize(w, "int4", importance=importance).dequantize() - w
    assert weighted[:, ::2].square().mean() < 0.97 * plain[:, ::2].square().mean()


def test_importance_is_that_of_each_group(monkeypatch):
    """As of the group's columns alone; chunks end within rows."""
    monkeypatch.setattr(four_bits, "CHUNK", 5 * 32)
    w, importance = torch.randn(7, 96), torch.rand(96) ** 4
    whole = QuantizedWeight.quantize(w, "int4", group_size=32, importance=importance)
    for group in range(3):
        part = slice(32 * group, 32 * group + 32)
        alone = QuantizedWeight.quantize(
            w[:, part], "int4", group_size=32, importance=importance[part]
        )
        assert torch.equal(whole.dequantize()[:, part], alone.dequantize())


@pytest.mark.parametrize("format", FORMATS)
def test_constant_and_zero_rows(format):
    w = torch.zeros(3, 64)
    w[1] = 0.375
    weight = QuantizedWeight.quantize(w, format)
    assert torch.equal(weight.dequantize(), w)
    assert torch.isfinite(weight.scale.float()).all()
    if format != "int4":
        assert (weight.scale > 0).all() and (weight.data[0].float() == 0).all()


@pytest.mark.parametrize("format", FORMATS)
def test_tiny_and_huge_weights(format):
    for size in (1e-6, 1e6):
        w = torch.randn(4, 64) * size
        assert relative_error(QuantizedWeight.quantize(w, format).dequantize(), w) < 0.1


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [1e-45, 1e-43])
def test_a_row_too_small_for_a_scale(size, format):
    """The least numbers of fp32: their scale is nothing, and the row's zeros are not 0 / 0."""
    w = torch.randn(3, 64)
    w[1], w[1, ::2] = 0, size
    read = QuantizedWeight.quantize(w, format).dequantize()
    assert torch.isfinite(read).all() and read[1].abs().max() < 1e-40


@pytest.mark.parametrize("format", FORMATS)
def test_layout_of_the_source_does_not_matter(format):
    w = torch.randn(64, 24)
    for other in (w.t().contiguous().t(), torch.randn(64, 48).copy_(w.repeat(1, 2))[:, :24]):
        assert torch.equal(
            QuantizedWeight.quantize(w, format).dequantize(),
            QuantizedWeight.quantize(other, format).dequantize(),
        )


def test_bytes():
    """Of a 16-bit weight: 0.51 at most in 8 bits, 0.29 in 4."""
    w = torch.randn(64, 1024)
    sixteen_bit = 2 * w.numel()
    assert QuantizedWeight.quantize(w).nbytes <= 0.51 * sixteen_bit
    assert QuantizedWeight.quantize(w, "fp8").nbytes <= 0.51 * sixteen_bit
    assert QuantizedWeight.quantize(w, "int4").nbytes == (0.5 + 4 / 64) * w.numel()
    assert QuantizedWeight.quantize(w, "int4").nbytes <= 0.29 * sixteen_bit


@pytest.mark.parametrize(
    ("in_features", "size"), [(4096, 128), (2048, 128), (1024, 64), (96, 32), (40, 8), (2112, 64)]
)
def test_group_size_that_is_taken(in_features, size):
    weight = QuantizedWeight.quantize(torch.randn(2, in_features), "int4")
    assert weight.group_size == size and weight.scale.shape == (2, in_features // size)


@pytest.mark.parametrize("rows", [1, 2, 7, 8])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_few_rows(format, rows, shape):
    """The packed weight read once, products and sums in fp32."""
    weight = QuantizedWeight.quantize(torch.randn(shape), format)
    x = torch.randn(rows, shape[1])
    y = packed_passes.few_rows(x, weight)
    if y is None:
        pytest.skip(native.library().reason)
    torch.testing.assert_close(y.double(), x.double() @ meaning(weight).t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 9, 15])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [*SHAPES, (6, 192)], ids=str)
def test_few_rows_of_bf16(format, rows, shape):
    """Products in bf16 are exact, sums in fp32; nothing beyond the blocks of rows counts."""
    weight = QuantizedWeight.quantize(torch.randn(shape), format)
    x = torch.randn(rows, shape[1]).bfloat16()
    if not packed_passes.takes_bf16_rows(x, weight):
        pytest.skip("no bf16 products here, or groups that they do not take")
    y, size = packed_passes.few_rows(x, weight), x.norm(dim=1).double()[:, None]
    assert y.dtype == torch.float32 and y.shape == (rows, shape[0])
    error = (y.double() - x.double() @ meaning(weight).t()).abs() / size
    assert error.max() < 5e-6 * weight.dequantize().norm(dim=1).max()


def test_copies_and_moves():
    weight = QuantizedWeight.quantize(torch.randn(4, 64), "int4", activation_bits=16)
    for other in (copy.deepcopy(weight), weight.to("cpu")):
        assert (other.format, other.group_size, other.activation_bits) == ("int4", 64, 16)
        assert torch.equal(other.dequantize(), weight.dequantize())
    assert copy.deepcopy(weight).data.data_ptr() != weight.data.data_ptr()
    assert weight.to("meta").device.type == "meta"


@pytest.mark.parametrize("format", FORMATS)
def test_tensors_survive_safetensors(format, tmp_path):
    from safetensors.torch import load_file, save_file

    weight = QuantizedWeight.quantize(torch.randn(4, 64), format)
    parts = {"data": weight.data, "scale": weight.scale, "offset": weight.offset}
    save_file({k: v for k, v in parts.items() if v is not None}, tmp_path / "w.safetensors")
    read = load_file(tmp_path / "w.safetensors")
    again = QuantizedWeight(
        read["data"], read["scale"], read.get("offset"), format, weight.group_size
    )
    assert torch.equal(again.dequantize(), weight.dequantize())


W = torch.randn(4, 64)
PACKED = QuantizedWeight.quantize(W, "int4")
REFUSED = {
    "int3": lambda: QuantizedWeight.quantize(W, "int3"),
    "got 48": lambda: QuantizedWeight.quantize(W, "int4", group_size=48),
    "group_size 128 does not divide the 64": lambda: QuantizedWeight.quantize(
        W, "int4", group_size=128
    ),
    "12 is no multiple of 8": lambda: QuantizedWeight.quantize(W[:, :12], "int4"),
    "int8 takes no group_size": lambda: QuantizedWeight.quantize(W, group_size=64),
    "activation_bits must be": lambda: QuantizedWeight.quantize(W, activation_bits=4),
    "activation_bits=8 needs": lambda: QuantizedWeight.quantize(W, "int4", activation_bits=8),
    "at least one number, got shape (0, 64)": lambda: QuantizedWeight.quantize(W[:0], "int4"),
    "data is on cpu, but a part on meta": lambda: QuantizedWeight(
        PACKED.data, PACKED.scale, PACKED.offset.to("meta"), "int4", 64
    ),
    "got shape (64,)": lambda: QuantizedWeight.quantize(W[0]),
    "got torch.int64": lambda: QuantizedWeight.quantize(torch.ones(4, 4, dtype=torch.int64)),
    "inf or nan": lambda: QuantizedWeight.quantize(torch.full((2, 8), torch.nan)),
    "importance must be [64]": lambda: QuantizedWeight.quantize(
        W, "int4", importance=torch.ones(63)
    ),
    "scale must be": lambda: QuantizedWeight(PACKED.data, W, PACKED.offset, "int4", 64),
    "data must be": lambda: QuantizedWeight(W, torch.ones(4), None, "int8", None),
    "data must be torch.int8 of shape (any, any), got torch.int8 (64,)": lambda: QuantizedWeight(
        torch.ones(64, dtype=torch.int8), torch.ones(1), None, "int8", None
    ),
    "scale must be torch.float32 of shape (4), got torch.float32 (3,)": lambda: QuantizedWeight(
        torch.ones(4, 4, dtype=torch.int8), torch.ones(3), None, "int8", None
    ),
    "offset must be": lambda: QuantizedWeight(PACKED.data, PACKED.scale, None, "int4", 64),
    "does not divide": lambda: QuantizedWeight(
        PACKED.data, PACKED.scale, PACKED.offset, "int4", 256
    ),
    "no offset": lambda: QuantizedWeight(
        torch.ones(4, 4, dtype=torch.int8), torch.ones(4), torch.ones(4), "int8", None
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    with pytest.raises((ValueError, TypeError)) as refusal:
        REFUSED[message]()
    assert message in str(refusal.value)
