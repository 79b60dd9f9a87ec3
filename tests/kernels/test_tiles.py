"""The shared pieces of kernels, each in a kernel of one tile: mask, activations, tile order."""

import pytest
import torch
import triton
import triton.language as tl

from artemis_kernels.core import rng, tiles
from artemis_kernels.ops.bottleneck_adapter.reference import ACTIVATIONS
from tests import kit
from tests.core import mask_oracle
from tests.kernels.truth import SEED, assert_close


@triton.jit
def _draw_tile(
    seed_ptr, out_ptr, start_m, start_n, N, threshold,
    PAIRED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = start_m + tl.arange(0, BLOCK_M)
    keep = tiles.keep_mask(seed_ptr, offs_m, start_n, N, threshold, PAIRED, BLOCK_N)
    offs = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(out_ptr + offs, keep.to(tl.int8))


def drawn(seed, start_m, start_n, columns, p, paired, rows=4, width=16):
    """A tile of the mask of a matrix with so many columns, as a kernel draws it."""
    out = torch.full((rows, width), 7, dtype=torch.int8)
    _draw_tile[(1,)](
        torch.tensor([seed]), out, start_m, start_n, columns, rng.threshold(p),
        PAIRED=paired, BLOCK_M=rows, BLOCK_N=width,
    )  # fmt: skip
    assert set(out.unique().tolist()) <= {0, 1}
    return out.bool()


@pytest.mark.parametrize("seed", [0, 1, -1, SEED, -(1 << 63)])
@pytest.mark.parametrize("paired", [True, False])
def test_mask_is_the_documented_one(seed, paired):
    columns, start_m, start_n, p = 48, 5, 16, 0.4
    keep = drawn(seed, start_m, start_n, columns, p, paired)
    for m in range(keep.shape[0]):
        for n in range(keep.shape[1]):
            index = (start_m + m) * columns + start_n + n
            assert keep[m, n] == mask_oracle.kept(index, p, seed), (m, n)


@pytest.mark.parametrize("paired", [True, False])
def test_mask_at_the_threshold(paired):
    """A lane equal to the threshold is kept, one below it is dropped."""
    lane = mask_oracle.lane(0, SEED)
    assert drawn(SEED, 0, 0, 16, lane / 65536, paired)[0, 0]
    assert not drawn(SEED, 0, 0, 16, (lane + 1) / 65536, paired)[0, 0]


def test_mask_with_odd_columns():
    """The two lanes of a hash fall into different rows there."""
    keep = drawn(SEED, 0, 0, 15, 0.5, paired=False, rows=8)[:, :15]
    kit.assert_same_bits(keep, rng.dropout_mask((8, 15), 0.5, SEED, "cpu"))


@pytest.mark.parametrize("columns", [1 << 12, (1 << 12) + 1])
def test_mask_beyond_two_to_the_33(columns):
    """The high word of a counter enters the keys, and indices need 64 bits."""
    start_m = (1 << 34) // columns + 3
    keep = drawn(SEED, start_m, 32, columns, 0.5, paired=False)
    for m in range(keep.shape[0]):
        for n in range(keep.shape[1]):
            index = (start_m + m) * columns + 32 + n
            assert keep[m, n] == mask_oracle.kept(index, 0.5, SEED), (m, n)


def test_paired_mask_near_its_limit():
    """Counters up to 2**32 - 1 wrap nowhere."""
    columns = 1 << 12
    start_m = (1 << 33) // columns - 4
    keep = drawn(SEED, start_m, columns - 16, columns, 0.5, paired=True)
    index = (start_m + 3) * columns + columns - 1
    assert index == (1 << 33) - 1
    assert keep[3, 15] == mask_oracle.kept(index, 0.5, SEED)


@triton.jit
def _activate_tile(z_ptr, h_ptr, slope_ptr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    z = tl.load(z_ptr + offs)
    tl.store(h_ptr + offs, tiles.activate(z, ACTIVATION))
    tl.store(slope_ptr + offs, tiles.activation_slope(z, ACTIVATION))


@pytest.mark.parametrize("name", kit.ACTIVATIONS)
def test_activation_and_slope(name):
    z = torch.cat(
        (torch.linspace(-12, 12, 505), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80, -80, 1e4]))
    )
    h, slope = torch.empty(512), torch.empty(512)
    _activate_tile[(1,)](z, h, slope, ACTIVATION=name, BLOCK=512)
    leaf = z.double().requires_grad_()
    wanted = ACTIVATIONS[name](leaf)
    (wanted_slope,) = torch.autograd.grad(wanted.sum(), leaf)
    assert_close(h, wanted.detach())
    assert_close(slope, wanted_slope)


@pytest.mark.parametrize("name", kit.ACTIVATIONS)
def test_activation_of_nan_is_nan(name):
    z, h, slope = torch.full((16,), torch.nan), torch.empty(16), torch.empty(16)
    _activate_tile[(1,)](z, h, slope, ACTIVATION=name, BLOCK=16)
    assert h.isnan().all()


@triton.jit
def _order(out_ptr, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    pid_m, pid_n = tiles.grouped_tile(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    tl.store(out_ptr + pid_m * tiles_n + pid_n, tl.program_id(0) + 1)


@pytest.mark.parametrize(("tiles_m", "tiles_n"), [(1, 1), (2, 5), (9, 3), (16, 2), (3, 1)])
def test_every_tile_has_one_program(tiles_m, tiles_n):
    out = torch.zeros(tiles_m, tiles_n, dtype=torch.int32)
    _order[(tiles_m * tiles_n,)](out, tiles_m, tiles_n, GROUP_M=4)
    assert sorted(out.flatten().tolist()) == list(range(1, tiles_m * tiles_n + 1))
