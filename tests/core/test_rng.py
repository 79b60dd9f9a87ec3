"""The dropout mask: its definition, golden values, and that it looks random where it must."""

import ctypes
import math
import subprocess
from pathlib import Path

import pytest
import torch

import artemis_kernels
from artemis_kernels.core import native, rng
from tests.core import mask_oracle

# Computed once by `mask_oracle`. A change here changes every training run that has a seed.
# seed: bit i set where element i is kept at p = 0.5, for the first 64 elements
GOLDEN_BITS = {
    0: 0x6F850D021192589F,
    1: 0xDCFBC54F52B2266C,
    -1: 0x94340CE915C7038A,
    7: 0xE00B490CE13FEC6C,
    1 << 40: 0x7AF8E99229260753,
    -(1 << 63): 0x98C820847A3C793A,
    (1 << 63) - 1: 0x30BF3003D1F8BDA9,
    0x0123456789ABCDEF: 0xDBF5090C8169F3DB,
}
# (index, seed): the 16-bit number that decides, on both sides of the 33-bit boundary
GOLDEN_LANES = {
    (0, 0): 0x967D,
    (1, 0): 0xF791,
    ((1 << 33) - 1, 0): 0xA85F,
    (1 << 33, 0): 0x6DDF,
    ((1 << 33) + 1, 0): 0xF718,
    ((1 << 40) + 12345, 0): 0x847B,
    (1 << 33, -1): 0xBB22,
    ((1 << 40) + 12345, 0x0123456789ABCDEF): 0xCC11,
}


@pytest.mark.parametrize("seed", GOLDEN_BITS)
def test_golden_bits(seed):
    kept = artemis_kernels.dropout_mask((64,), 0.5, seed, "cpu").tolist()
    assert sum(keep << i for i, keep in enumerate(kept)) == GOLDEN_BITS[seed]


@pytest.mark.parametrize(("index", "seed"), GOLDEN_LANES)
def test_golden_lanes_of_the_definition(index, seed):
    assert mask_oracle.lane(index, seed) == GOLDEN_LANES[index, seed]


@pytest.mark.parametrize("p", [0.0, 1e-5, 0.1, 0.5, 0.9, 0.99999])
@pytest.mark.parametrize("shape", [(40,), (7, 13), (3, 5, 7), (1, 1), (0, 4)], ids=str)
def test_mask_is_the_definition(shape, p):
    """Row-major over any shape; odd columns let a row start in the second lane of a hash."""
    mask = artemis_kernels.dropout_mask(shape, p, 1234567890123456789, "cpu")
    assert mask.shape == shape and mask.dtype == torch.bool
    wanted = [mask_oracle.kept(index, p, 1234567890123456789) for index in range(math.prod(shape))]
    assert mask.reshape(-1).tolist() == wanted


@pytest.mark.parametrize("index", [0, 1, 12, 77])
def test_kept_from_the_threshold_on(index):
    """A lane equal to the threshold is kept, one below it dropped: no rate would show the step."""
    lane = mask_oracle.lane(index, 3)
    for threshold, keep in ((lane - 1, True), (lane, True), (lane + 1, False)):
        mask = artemis_kernels.dropout_mask((100,), threshold / 65536, 3, "cpu")
        assert mask[index] == keep


def test_counters_beyond_32_bits_draw_from_other_keys():
    """What no tensor that fits here can show: the hash of pair 2**32 + i."""
    for seed in (5, -3):
        words = rng._hash(8, 1, torch.tensor(seed)).tolist()
        lanes = [word >> shift & 0xFFFF for word in words for shift in (0, 16)]
        assert lanes == [mask_oracle.lane((1 << 33) + i, seed) for i in range(16)]


@pytest.fixture(scope="module")
def factors(tmp_path_factory):
    """`factors` of native/mask.h: (first, count, seed) -> what decides over each element."""
    if native.library().handle is None:
        pytest.skip(native.library().reason)
    folder, compiler = tmp_path_factory.mktemp("mask"), next(native._compilers())
    (folder / "mask.c").write_text(
        '#include <string.h>\n#include "mask.h"\n'
        "void kept(float *to, int64_t first, int64_t count, uint64_t seed) {\n"
        "    float buffer[1026];\n"
        "    const float *from = factors(buffer, first, count, seed, 1u << 15, 2);\n"
        "    memcpy(to, from, sizeof(float) * (size_t)count);\n"
        "}\n"
    )
    include, target = Path(native.__file__).parent, folder / "mask.so"
    command = (compiler, *native._FLAGS, f"-I{include}", "-shared", folder / "mask.c", "-o", target)
    subprocess.run(command, check=True)
    kept = ctypes.CDLL(str(target)).kept
    kept.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint64]

    def call(first: int, count: int, seed: int) -> list[float]:
        out = torch.empty(count)
        kept(out.data_ptr(), first, count, seed)
        return out.tolist()

    return call


@pytest.mark.parametrize("turn", [1, 3])
@pytest.mark.parametrize("before", [1000, 301, 2, 1, 0])
def test_a_compiled_chunk_may_cross_into_other_keys(before, turn, factors):
    """As the last row of a matrix does that begins before element 2**33 and ends behind it."""
    for first, seed in ((turn * (1 << 33) - before, 3), (40, 5)):
        wanted = [2.0 * mask_oracle.kept(first + i, 0.5, seed) for i in range(1001)]
        assert factors(first, 1001, seed) == wanted


@pytest.mark.parametrize("seed", [0, 3, -5, 2**62])
def test_int_and_tensor_seed_agree(seed):
    by_int = artemis_kernels.dropout_mask((9, 7), 0.4, seed, "cpu")
    for tensor in (torch.tensor([seed]), torch.tensor(seed)):
        assert torch.equal(artemis_kernels.dropout_mask((9, 7), 0.4, tensor, "cpu"), by_int)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_keep_rate(p):
    """Within five standard deviations of the effective rate, for each lane."""
    count = 1 << 20
    mask = artemis_kernels.dropout_mask((count // 2, 2), p, 42, "cpu")
    rate = 1 - round(p * 65536) / 65536
    deviation = math.sqrt(rate * (1 - rate) / (count // 2))
    for lane in (0, 1):
        assert abs(mask[:, lane].double().mean() - rate) < 5 * deviation


def test_keep_scale_undoes_the_effective_rate():
    """The expectation is exact though p is not a multiple of 1/65536."""
    for p in (1e-5, 0.1, 1 / 3, 0.5, 0.99999):
        kept = sum(lane >= rng.threshold(p) for lane in range(65536)) / 65536
        assert rng.keep_scale(p) == 1 / kept
    assert rng.threshold(1 - 1e-9) == 65535  # something is always kept


@pytest.mark.parametrize("distance", [1, 2, 3, 64, 4096])
def test_neighbours_are_independent(distance):
    """Elements of one hash (distance 1), of neighbouring counters, and a row apart."""
    signs = _signs((1 << 20,), seed=9)
    assert_uncorrelated(signs[:-distance], signs[distance:])


@pytest.mark.parametrize("other", [1, 2, 1 << 16, 1 << 31, 1 << 32, 1 << 40, 1 << 62, -1])
def test_seeds_are_independent(other):
    """Seeds that differ in one bit, low or high, share nothing: nor shifted by a few elements."""
    one, two = _signs((1 << 18,), 0), _signs((1 << 18,), other)
    assert_uncorrelated(one, two)
    for shift in (1, 2, 3):
        assert_uncorrelated(one[shift:], two[:-shift])


def test_drawn_seeds_follow_torchs_generator():
    torch.manual_seed(3)
    first, second = artemis_kernels.new_seed("cpu"), artemis_kernels.new_seed("cpu")
    torch.manual_seed(3)
    assert artemis_kernels.new_seed("cpu") == first != second
    assert first.shape == (1,) and first.dtype == torch.int64


def _signs(shape, seed) -> torch.Tensor:
    return artemis_kernels.dropout_mask(shape, 0.5, seed, "cpu").double() * 2 - 1


def assert_uncorrelated(a: torch.Tensor, b: torch.Tensor) -> None:
    assert abs((a * b).mean()) < 5 / math.sqrt(a.numel())
