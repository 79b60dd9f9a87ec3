"""Products in 8 bits: exact integers, the rounding of rows, columns kept apart."""

import pytest
import torch

from artemis_kernels import QuantizedWeight
from artemis_kernels.core import eight_bit, eight_bit_rows, native
from artemis_kernels.core.native import Native
from artemis_kernels.core.products import LowRank
from tests.kit import logits_gradient

SHAPES = [
    (0, 8, 6), (1, 33, 17), (2, 1, 1), (5, 1, 7), (20, 1, 33), (15, 40, 24), (129, 130, 20),
    (33, 1301, 5), (3, 8, 0),
]  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def plain(monkeypatch):
    """Call it to switch the compiled passes and the processor's int8 products off."""

    def switch_off():
        monkeypatch.setattr(native, "library", lambda: Native(None, "switched off"))
        monkeypatch.setattr(eight_bit, "multiplies_int8", lambda device: False)

    return switch_off


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize("way", ["processor", "plain"])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES, ids=str)
def test_sums_are_exact(m, k, n, way, plain):
    """Against int64 in numpy, both ways round, extreme values among them."""
    if way == "plain":
        plain()
    q, w = integers(m, k), integers(n, k)
    q[:, : k // 2], w[:, : k // 2] = -128, -128
    q[:1], w[:1] = 127, -127  # at k = 1301 an odd sum beyond 2²⁴, which fp32 cannot hold
    truth = q.numpy().astype("int64") @ w.numpy().astype("int64").T
    assert (eight_bit.integer_product(q, w.t()).numpy() == truth).all()
    assert (eight_bit.integer_product(q, w.t().contiguous()).numpy() == truth).all()
    assert eight_bit.integer_product(q, w.t()).dtype == torch.int32


@pytest.mark.parametrize("factor", [False, True], ids=["plain-x", "scaled-x"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (5, 33), (65, 1100), (129, 64)])
def test_rows_are_rounded_to_the_nearest_of_255_levels(m, k, dtype, factor):
    x, by = torch.randn(m, k).to(dtype), torch.rand(k) + 0.5 if factor else None
    q, scale, apart, _ = eight_bit_rows.round_rows(x, by)
    v = x.double() if by is None else x.double() * by.double()
    if apart is not None:
        v[:, apart] = 0
    torch.testing.assert_close(scale.double(), v.abs().amax(1) / 127, rtol=1e-6, atol=0)
    assert ((q * scale.double()[:, None] - v).abs() <= 0.5001 * scale.double()[:, None]).all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_compiled_and_plain_agree_to_the_bit(dtype, plain):
    x, w = torch.randn(70, 513).to(dtype), QuantizedWeight.quantize(torch.randn(65, 513))
    x[:, 9] *= 60
    x[3], x[4, 7], x[5, 8] = 0, torch.nan, torch.inf
    bias, dy = torch.randn(65), torch.randn(70, 65).to(dtype)
    even, into = torch.randn(70, 512).to(dtype), torch.randn(70, 512).to(dtype)
    narrow = QuantizedWeight.quantize(w.dequantize()[:64, :512])

    def everything():
        rounded = eight_bit_rows.round_rows(x, None)
        acc = eight_bit.integer_product(rounded.q, w.data.t())
        assert 9 in rounded.apart
        return (
            *rounded[:3],
            *eight_bit_rows.round_rows(dy, w.scale)[:2],
            eight_bit.linear(even, narrow.data, narrow.scale, bias[:64]),
            eight_bit.linear(even, narrow.data, narrow.scale, None),
            eight_bit.input_gradient(dy[:, :64], narrow.data, narrow.scale),
            eight_bit.input_gradient(dy[:, :64], narrow.data, narrow.scale, into.clone()),
            eight_bit.restore(acc, rounded.scale, dtype, w.scale, bias),
            eight_bit.restore(acc, rounded.scale, dtype, w.scale),
            eight_bit.restore(acc, rounded.scale, dtype),
        )

    compiled = everything()
    plain()
    for before, after in zip(compiled, everything(), strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before.nan_to_num(nan=7.0), after.nan_to_num(nan=7.0))


@pytest.mark.parametrize("outlying", [(), (5,), (0, 30, 59)], ids=str)
@pytest.mark.parametrize("rank", [None, 0, 1, 24, 25])
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [
        (1, 4, 1),
        (7, 192, 60),
        (8, 256, 64),
        (9, 196, 68),
        (17, 20_000, 70),
        (17, 72, 9_000),
        (270, 132, 400),
    ],  # fmt: skip
    ids=str,
)
def test_everything_after_a_product(m, k, n, rank, outlying):
    """Columns apart, scales, bias, low-rank term, addition: against fp64, in all tiles."""
    data, scale, bias = integers(n, k), torch.rand(n) + 0.5, torch.randn(n)
    x, dy, into = torch.randn(m, k), torch.randn(m, n), torch.randn(m, k)
    for column in outlying if n > 30 else ():
        x[:, column] *= 100
        dy[:, column] *= 100
    of_y = of_x = None
    through_y = through_x = 0
    if rank is not None:
        s = torch.randn(m, rank)
        of_y = LowRank(s, torch.randn(n, rank), 0.7)
        of_x = LowRank(s, torch.randn(rank, k).t())
        through_y, through_x = (t.alpha * t.s.double() @ t.g.double().t() for t in (of_y, of_x))

    def values(x, factor):
        rounded = eight_bit_rows.round_rows(x, factor)
        v = rounded.q.double() * rounded.scale.double()[:, None]
        if rounded.apart is not None:
            v[:, rounded.apart] = (x if factor is None else x * factor)[:, rounded.apart].double()
        return v

    def close(actual, truth):
        torch.testing.assert_close(
            actual.double(), truth, rtol=1e-5, atol=1e-5 * truth.abs().max().item()
        )

    y = eight_bit.linear(x, data, scale, bias, None, of_y)
    close(y, values(x, None) @ data.t().double() * scale + bias + through_y)
    truth = values(dy, scale) @ data.double() + through_x
    close(eight_bit.input_gradient(dy, data, scale, None, of_x), truth)
    close(eight_bit.input_gradient(dy, data, scale, into.clone(), of_x), into + truth)


def test_as_many_threads_as_there_are(monkeypatch):
    """A number that does not divide the panels, and one above them."""
    x, weight = torch.randn(40, 96), QuantizedWeight.quantize(torch.randn(150, 96))
    alone = eight_bit.linear(x, weight.data, weight.scale, None)
    for threads in (1, 3, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(eight_bit.linear(x, weight.data, weight.scale, None), alone)


def test_zeros_tiny_rows_and_rows_that_are_not_finite():
    x = torch.randn(6, 40)
    x[0], x[1], x[2] = 0, 1e-38, 1e-30
    x[3, 5], x[4, 6] = torch.nan, -torch.inf
    weight = QuantizedWeight.quantize(torch.randn(24, 40))
    y = eight_bit.linear(x, weight.data, weight.scale, None)
    assert (y[:2].abs() < 1e-36).all()
    assert not torch.isfinite(y[3:5]).any()
    truth = x.double() @ weight.dequantize(torch.float64).t()
    for row in (2, 5):  # a neighbour's nan or inf stays with the neighbour
        assert (y[row] - truth[row]).norm() < 0.03 * truth[row].norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 4, 7, 66, 131])
def test_rows_are_rounded_each_by_itself(rows, dtype):
    """Several go through the pass together."""
    x = (torch.randn(rows, 50) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
    q, scale, apart, _ = eight_bit_rows.round_rows(x, None)
    kept = torch.ones(50) if apart is None else torch.ones(50).index_fill(0, apart, 0)
    for i, row in enumerate(x):
        alone = (row.double() * kept).abs().max() / 127
        torch.testing.assert_close(scale[i].double(), alone, rtol=1e-6, atol=0)
        assert ((q[i] * alone - row.double() * kept).abs() <= 0.5001 * alone).all()


def test_scales_of_any_strides():
    data, dy = integers(32, 40), torch.randn(20, 32)
    scale = torch.rand(64)[::2]
    assert torch.equal(
        eight_bit.input_gradient(dy, data, scale),
        eight_bit.input_gradient(dy, data, scale.contiguous()),
    )


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    return ((actual.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1, 50, 1000])
def test_outlying_features(magnitude, dtype):
    """0.2 % of the features far above the rest: within 1.5 times of weight-only's error.

    Looked at over the rest too, which a row scale stretched by the outliers would round away.
    """
    w = torch.randn(96, 1024) / 32
    weight = QuantizedWeight.quantize(w)
    x = torch.randn(80, 1024)
    outlying = [100, 900]
    x[:, outlying] *= magnitude
    x = x.to(dtype)
    truth = x.double() @ w.double().t()
    weight_only = x.double() @ weight.dequantize(torch.float64).t()
    y = eight_bit.linear(x, weight.data, weight.scale, None)
    assert relative_error(y, truth) <= 1.5 * relative_error(weight_only, truth)
    rounded = eight_bit_rows.round_rows(x, None)
    assert (rounded.apart is None) == (magnitude == 1)
    rest = x.double()
    rest[:, outlying if magnitude > 1 else []] = 0
    back = rounded.q * rounded.scale.double()[:, None]
    assert relative_error(back, rest) < 0.01


@pytest.mark.parametrize("way", ["compiled", "plain"])
@pytest.mark.parametrize("magnitude", [1.0, 1e-5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outlying_gradients(dtype, magnitude, way, plain):
    """The scales of such a weight times small gradients are nothing in fp16, their sums are not."""
    if way == "plain":
        plain()
    weight = QuantizedWeight.quantize(torch.randn(256, 96) / 16)
    dy = torch.randn(70, 256)
    dy[:, [3, 200]] *= 100
    dy = (dy * magnitude).to(dtype)
    truth = dy.double() @ weight.dequantize(torch.float64)
    assert relative_error(eight_bit.input_gradient(dy, weight.data, weight.scale), truth) < 0.005


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 130])
def test_one_large_value_anywhere_sets_its_column_apart(rows, dtype):
    """A first token may carry all there is of a feature (Sun et al., arXiv 2402.17762)."""
    for row in {0, rows // 2, rows - 1}:
        x = torch.ones(rows, 70, dtype=dtype)
        x[row, 5] = -300
        assert eight_bit_rows.round_rows(x, None).apart.tolist() == [5]


@pytest.mark.parametrize("way", ["compiled", "plain"])
def test_what_stands_out_is_told_by_the_lower_median(way, plain):
    if way == "plain":
        plain()
    x = torch.full((20, 130), 3.0)
    x[:, :65], x[3, [70, 129]] = 1, -5
    assert eight_bit_rows.round_rows(x, None).apart.tolist() == [70, 129]
    x[:, 0] = 3  # 66 of 130 columns now
    assert eight_bit_rows.round_rows(x, None).apart is None


def test_few_columns_are_kept_apart_however_many_stand_out():
    largest = torch.ones(640)
    assert eight_bit_rows.outliers(largest) is None
    largest[:100] = torch.arange(100.0, 200.0)
    assert sorted(eight_bit_rows.outliers(largest).tolist()) == list(range(90, 100))
    assert eight_bit_rows.outliers(torch.tensor([1.0, 1.0, 9.0])).tolist() == [2]
    assert eight_bit_rows.outliers(torch.tensor([5.0])) is None
    assert eight_bit_rows.outliers(torch.empty(0)) is None


@pytest.mark.parametrize("way", ["compiled", "plain"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (3, 2), (5, 63), (4, 64), (7, 65), (40, 1500)])
def test_rounding_of_logits_loses_no_sum(m, k, dtype, way, plain):
    """A peak exact, the rest within one step, and in each lane every partial sum within half."""
    if way == "plain":
        plain()
    dy, factor = logits_gradient(m, k, 3.0, dtype), torch.rand(k) + 0.5
    q, scale, apart, peaks = eight_bit_rows.round_logits(dy, factor)
    v = dy.double() * factor.double()
    assert apart is None and q.dtype == torch.int8 and q.is_contiguous()
    torch.testing.assert_close(peaks.value.double().abs(), v.abs().amax(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(peaks.value.double(), v.gather(1, peaks.at[:, None])[:, 0])
    v.scatter_(1, peaks.at[:, None], 0.0)
    torch.testing.assert_close(scale.double(), v.abs().amax(1) / 126, rtol=1e-6, atol=0)
    step = scale.double()[:, None]
    wrong = torch.nn.functional.pad(q * step - v, (0, -k % 64)).view(m, -1, 64)
    assert (wrong.abs() <= 1.001 * step[..., None]).all()
    assert (wrong.cumsum(1).abs() <= 0.501 * step[..., None] + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_logits_compiled_and_plain_agree_to_the_bit(dtype, plain):
    dy, factor = logits_gradient(30, 1001, 2.0, dtype), torch.rand(1001) + 0.5
    dy[3], dy[4, 7], dy[5, 8] = 0, torch.nan, -torch.inf
    dy[6], dy[6, 900] = 0, 1.0  # a peak and nothing else
    compiled = eight_bit_rows.round_logits(dy, factor)
    plain()
    other = eight_bit_rows.round_logits(dy, factor)
    good = [i for i in range(30) if i not in (4, 5)]
    assert torch.equal(compiled.q, other.q)
    assert torch.equal(compiled.scale.nan_to_num(7.0), other.scale.nan_to_num(7.0))
    assert torch.equal(compiled.peaks.value, other.peaks.value)
    assert torch.equal(compiled.peaks.at[good], other.peaks.at[good])
    assert compiled.scale[4:6].isnan().all() and compiled.peaks.at[6] == 900


@pytest.mark.parametrize("way", ["compiled", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("added", [False, True], ids=["written", "added"])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 8, 3), (9, 1500, 70), (17, 64, 32)], ids=str)
def test_a_product_with_peaks(m, k, n, added, dtype, way, plain):
    if way == "plain":
        plain()
    dy, data, scale = logits_gradient(m, k, 3.0, dtype), integers(k, n), torch.rand(k) + 0.5
    plus = LowRank(torch.randn(m, 2), torch.randn(n, 2), 0.7)
    into = torch.randn(m, n).to(dtype)
    rounded = eight_bit_rows.round_logits(dy, scale)
    v = rounded.q.double() * rounded.scale.double()[:, None]
    v.scatter_add_(1, rounded.peaks.at[:, None], rounded.peaks.value.double()[:, None])
    truth = v @ data.double() + 0.7 * (plus.s @ plus.g.t()).double() + (into.double() * added)
    start = into.clone() if added else None
    plus = plus._replace(s=plus.s.to(dtype), g=plus.g.to(dtype))
    got = eight_bit.input_gradient(dy, data, scale, start, plus, logits=True)
    assert got.dtype == dtype and (start is None or got is start)
    limits = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
    assert relative_error(got, truth) < limits[dtype]


def test_sums_over_tokens_keep_what_small_probabilities_carry():
    """What gains and biases feel. Without care it would be off by a large part."""
    weight = QuantizedWeight.quantize(torch.randn(4000, 64) + torch.randn(64))
    dy = logits_gradient(512, 4000, 3.0)
    truth = dy.double() @ weight.dequantize(torch.float64)

    def errors(logits):
        dx = eight_bit.input_gradient(dy, weight.data, weight.scale, logits=logits)
        return relative_error(dx, truth), relative_error(dx.sum(0), truth.sum(0))

    careless, careful = errors(False), errors(True)
    assert careful[0] < 0.03 and careful[1] < 0.03
    assert careless[1] > 4 * careful[1]
