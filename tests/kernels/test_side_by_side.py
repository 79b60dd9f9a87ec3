"""Matrices of several adapters side by side: each keeps its mask, its columns and its scale."""

from dataclasses import replace

import pytest
import torch

from artemis_kernels.core.rng import dropout_mask, keep_scale
from artemis_kernels.core.tiling import Config
from artemis_kernels.ops.low_rank.arguments import Scale
from artemis_kernels.ops.low_rank.expand import expand, update
from artemis_kernels.ops.low_rank.expand_backward import expand_backward
from artemis_kernels.ops.low_rank.shrink import shrink
from artemis_kernels.ops.low_rank.shrink_backward import shrink_backward
from tests.kernels.truth import dropout

pytestmark = pytest.mark.usefixtures("guarded_allocations")

TINY = Config(16, 32, 32, 16, warps=1, stages=1)
SPLITS = pytest.mark.parametrize("config", [TINY, replace(TINY, split=2)], ids=["whole", "split"])


@SPLITS
@pytest.mark.parametrize("widths", [(8, 3, 12), (8, 2, 44, 16), (1, 1), (64, 64)], ids=str)
def test_each_has_the_mask_it_would_have_alone(config, widths):
    """Bit for bit, in tiles that cut members anywhere; even widths draw in pairs."""
    m, r, by = 35, sum(widths), dropout()
    x, f = torch.zeros(m, 72), torch.zeros(r, 72)
    z, h = shrink(
        x, f, config=config, stage="forward", bias=torch.ones(r), dropout=by, with_h=True,
        widths=widths,
    )  # fmt: skip
    assert torch.equal(z, torch.ones(m, r))
    for width, part in zip(widths, h.split(widths, 1), strict=True):
        alone = dropout_mask((m, width), by.p, by.seed, "cpu")
        assert torch.equal(part, alone * torch.tensor(keep_scale(by.p)))


def between(m: int, r: int) -> torch.Tensor:
    """Columns of a wider matrix, to be written or read by rows that lie apart."""
    return torch.full((m, r + 9), float("nan"))[:, 5 : 5 + r]


def placed(t: torch.Tensor) -> torch.Tensor:
    return between(*t.shape).copy_(t)


@SPLITS
def test_gradients_are_written_scaled_between_others(config):
    m, n, r = 35, 41, 20
    dy, u, z, scale = torch.randn(m, n), torch.randn(n, r), torch.randn(m, r), Scale(0.5, None)
    scale = scale._replace(tensor=torch.tensor(-1.5))
    options = {"stage": "backward", "activation": "silu", "dropout": dropout(), "config": config}
    for run in (
        lambda z, **more: expand_backward(dy, u, z, **options, **more)[:2],
        lambda z, **more: shrink(dy, u.t(), z=z, with_h=True, **options, **more),
    ):
        dz, other = run(z)
        out = between(m, r)
        found, same = run(placed(z), out=out, scale=scale)
        assert found is out and torch.equal(same, other)
        torch.testing.assert_close(out, dz * -0.75)
        assert out._base.isnan().sum() == 9 * m


def test_readers_take_columns_of_a_wider_matrix():
    m, k, n, r = 35, 40, 41, 20
    x, w, s, b = torch.randn(m, k), torch.randn(n, k), torch.randn(m, r), torch.randn(n, r)
    for read in (
        lambda s: expand(x, w, s, b, config=TINY),
        lambda s: update(None, s, b, config=TINY, dtype=torch.float32),
        lambda s: shrink_backward(x, s, config=TINY)[0],
    ):
        assert torch.equal(read(placed(s)), read(s))
