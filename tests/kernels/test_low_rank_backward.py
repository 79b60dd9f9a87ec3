"""The backward kernels of the low-rank family, one by one, against fp64 sums."""

from dataclasses import replace

import pytest
import torch

from artemis_kernels.core import tuning
from artemis_kernels.core.device import CHIPS, INTERPRETER
from artemis_kernels.ops.low_rank.arguments import NO_DROPOUT, Dropout, Scale
from artemis_kernels.ops.low_rank.expand_backward import expand_backward
from artemis_kernels.ops.low_rank.shrink_backward import shrink_backward
from artemis_kernels.ops.low_rank.steps import Hidden, expand_gradients
from artemis_kernels.ops.low_rank.sum_parts import sum_parts
from tests import kit
from tests.kernels.truth import (
    TINY,
    TINY_SPLIT,
    assert_close,
    dropout,
    dropped,
    rounded,
    units,
    units_gradient,
)

pytestmark = pytest.mark.usefixtures("guarded_allocations")

SHAPES = [(35, 50, 20), (32, 48, 16), (3, 5, 1)]  # m, n, r
SPLITS = pytest.mark.parametrize("config", [TINY, TINY_SPLIT], ids=["whole", "split"])
CHIP = CHIPS[INTERPRETER]


@SPLITS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stage", ["linear", "backward"])
@pytest.mark.parametrize("with_columns", [False, True])
def test_expand_backward(config, shape, stage, with_columns):
    m, n, r = shape
    dy, b, z = torch.randn(m, n), torch.randn(n, r), torch.randn(m, r)
    by = NO_DROPOUT if stage == "linear" else dropout()
    out, db, columns = expand_backward(
        dy, b, z, config=config, stage=stage, activation="gelu_tanh", dropout=by,
        with_columns=with_columns,
    )  # fmt: skip
    exact, h = dy.double() @ b.double(), z.double()
    if stage == "backward":
        exact, h = units_gradient(exact, z, "gelu_tanh", by), units(z, "gelu_tanh", by)
    assert_close(out, exact)
    assert_close(db.sum(0), dy.double().T @ h)
    if with_columns:
        assert_close(columns.sum(0), dy.double().sum(0))
    else:
        assert columns is None


def test_expand_backward_in_16_bits():
    """dS and the parts of dB are fp32 sums of 16-bit products; only B and S are rounded."""
    dy, b, s = torch.randn(35, 50).half(), torch.randn(50, 20), torch.randn(35, 20)
    ds, db, columns = expand_backward(dy, b, s, config=TINY, with_columns=True)
    assert ds.dtype == db.dtype == columns.dtype == torch.float32
    assert_close(ds, dy.double() @ rounded(b, dy))
    assert_close(db.sum(0), dy.double().T @ rounded(s, dy))


@SPLITS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by", [NO_DROPOUT, dropout()], ids=["all", "dropout"])
def test_shrink_backward(config, shape, by):
    m, k, r = shape
    x, s = torch.randn(m, k), torch.randn(m, r)
    parts, columns = shrink_backward(x, s, config=config, dropout=by, with_columns=True)
    assert_close(parts.sum(0), s.double().T @ dropped(x, by))
    assert_close(columns.sum(0), x.double().sum(0))


def test_shrink_backward_splits_more_than_there_are_rows():
    x, s = torch.randn(20, 10), torch.randn(20, 4)
    parts, _ = shrink_backward(x, s, config=replace(TINY, split=8))
    assert parts.shape == (8, 4, 10)
    assert_close(parts.sum(0), s.double().T @ x.double())


@pytest.mark.parametrize("count", [0, 1, 16, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sum_parts(count, dtype):
    parts, other = torch.randn(count, 13, 21), torch.randn(21, 13).t()
    out = torch.empty(21, 13, dtype=dtype).t()
    dot = sum_parts(parts, out, scale=Scale(0.5, torch.tensor(3.0)), other=other)
    total = parts.double().sum(0)
    assert_close(out, 1.5 * total)
    assert dot.shape == () and dot.dtype == torch.float32
    assert abs(dot.item() - (total * other.double()).sum().item()) < 1e-4


@pytest.mark.parametrize("layout", kit.LAYOUTS)
def test_any_strides(layout):
    dy, b, z = torch.randn(20, 33), torch.randn(33, 10), torch.randn(20, 10)
    pairs = [
        (
            expand_backward(layout(dy), layout(b), z, config=TINY, with_columns=True),
            expand_backward(dy, b, z, config=TINY, with_columns=True),
        ),
        (
            shrink_backward(layout(dy), z, config=TINY, with_columns=True),
            shrink_backward(dy, z, config=TINY, with_columns=True),
        ),
    ]
    for laid, plain in pairs:
        for mine, wanted in zip(laid, plain, strict=True):
            kit.assert_same_bits(mine, wanted)


def test_gradients_of_stride_zero():
    """`y.sum().backward()` delivers one element for all of dY."""
    dy, b, s = torch.full((), 0.5).expand(20, 33), torch.randn(33, 10), torch.randn(20, 10)
    ds, db, _ = expand_backward(dy, b, s, config=TINY)
    assert_close(ds, dy.double() @ b.double())
    assert_close(db.sum(0), dy.double().T @ s.double())


@pytest.mark.parametrize(
    ("r", "one_read"), [(12, None), (12, False), (70, None)], ids=["one read", "two", "two, wide"]
)
@pytest.mark.parametrize("hidden", [None, Hidden("gelu", Dropout(0.3, torch.tensor([5])))])
@pytest.mark.parametrize("wants", kit.subsets(("hidden", "b", "dot", "columns")), ids="+".join)
def test_expand_gradients(r, one_read, hidden, wants):
    """Whatever is asked for, in whichever way it is computed, it is the same gradient."""
    dy, b, z = torch.randn(34, 40), torch.randn(40, r), torch.randn(34, r)
    scale = Scale(0.5, torch.tensor(3.0))
    gradients = expand_gradients(
        dy, b, z, CHIP, hidden=hidden, scale=scale, one_read=one_read,
        **{f"wants_{name}": name in wants for name in ("hidden", "b", "dot", "columns")},
    )  # fmt: skip
    exact, h = dy.double() @ b.double(), z.double()
    if hidden is not None:
        exact, h = units_gradient(exact, z, *hidden), units(z, *hidden)
    db = dy.double().T @ h
    if "hidden" in wants:
        assert_close(gradients.hidden, exact)
    if "b" in wants:
        assert_close(gradients.b, 1.5 * db)
    if "dot" in wants:
        dot = (db * b.double()).sum()
        assert abs(gradients.dot.double() - dot) < 1e-5 * (db * b.double()).abs().sum()
    if "columns" in wants:
        assert_close(gradients.columns, dy.double().sum(0))


@pytest.mark.parametrize("one_read", [True, False])
def test_the_way_with_fewer_bytes_is_taken(one_read, monkeypatch):
    asked, config = [], tuning.config
    monkeypatch.setattr(tuning, "one_read", lambda shape, chip: one_read)
    monkeypatch.setattr(tuning, "config", lambda *a: asked.append(a[0]) or config(*a))
    expand_gradients(
        torch.randn(34, 40), torch.randn(40, 12), torch.randn(34, 12), CHIP, hidden=None,
        scale=Scale(1.0), wants_hidden=True, wants_b=True, wants_dot=False, wants_columns=False,
    )  # fmt: skip
    assert asked == (["expand_backward"] if one_read else ["shrink", "shrink_backward"])


def test_no_rows():
    out, db, columns = expand_backward(
        torch.randn(0, 6), torch.randn(6, 3), torch.randn(0, 3), config=TINY, with_columns=True
    )
    assert out.shape == (0, 3) and db.shape == (0, 6, 3) and columns.shape == (0, 6)
    parts, columns = shrink_backward(
        torch.randn(0, 6), torch.randn(0, 3), config=TINY, with_columns=True
    )
    total = torch.empty(3, 6)
    sum_parts(parts, total)
    assert (total == 0).all() and columns.shape == (0, 6)
