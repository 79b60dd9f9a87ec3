"""Choices of tiles and strategies: pure functions, tested for chips that are not here."""

from dataclasses import asdict, replace

import pytest
import torch

from artemis_kernels.core import tables, tiling, tuning
from artemis_kernels.core.device import CHIPS, INTERPRETER, Chip, chip
from artemis_kernels.core.tiling import HEURISTICS, Shape
from artemis_kernels.ops.lora_linear import fused

GPUS = [one for name, one in CHIPS.items() if name != INTERPRETER]
UNKNOWN = Chip("sm_999", 7, 48 * 1024)
HOPPER = CHIPS["sm_90"]


@pytest.mark.parametrize("kernel", HEURISTICS)
@pytest.mark.parametrize("on", [*GPUS, UNKNOWN, CHIPS[INTERPRETER]], ids=lambda c: c.name)
def test_tiles_are_legal(kernel, on):
    """Powers of two, a dot's minimum of 16, parts of at least one step; on any chip."""
    least = 1 if kernel.startswith(("matvec", "round_rows")) else 16
    for m in (0, 1, 16, 100, 8192, 1 << 20):
        for n, k, r in ((1, 1, 1), (4096, 4096, 8), (14336, 4096, 64), (4097, 333, 256)):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                one = tuning.config(kernel, Shape(m, n, k, r, dtype), on)
                for size in (one.block_m, one.block_n, one.block_k, one.block_r):
                    assert size == 0 or (size >= least and size & (size - 1) == 0), one
                assert one.split >= 1 and one.stages >= 1 and one.warps in (1, 2, 4, 8), one


def test_rows_are_bucketed():
    """Lengths that vary from batch to batch share a configuration: nothing is compiled again."""
    configs = {tuning.config("expand", Shape(m, 64, 64, 8), HOPPER) for m in range(1025, 2049)}
    assert len(configs) == 1


def test_few_rows_split_the_reduction():
    """16 rows are one block of rows: only a split sum fills 132 processors."""
    assert tuning.config("shrink", Shape(16, k=4096, r=16), HOPPER).split >= 8
    assert tuning.config("shrink", Shape(1 << 20, k=4096, r=16), HOPPER).split == 1


def test_a_measured_table_wins(tmp_path, monkeypatch):
    """A user's entry is taken for its shape alone, on its chip alone."""
    shape = Shape(8192, 640, 320, 8)
    usual = tuning.config("expand", shape, HOPPER)
    measured = replace(usual, stages=2, warps=2)
    path = write_tiles(tmp_path, f"expand {shape.bucket.key}", measured, usual)
    monkeypatch.setattr(tables, "USER_TABLES", path.parent)
    tables.reload()
    assert tuning.config("expand", shape, HOPPER) == measured
    assert tuning.config("expand", shape._replace(m=8191), HOPPER) == measured
    assert tuning.config("expand", shape._replace(k=352), HOPPER) != measured
    assert tuning.config("expand", shape, CHIPS["sm_80"]) != measured
    tables.reload()


def test_an_entry_holds_only_against_what_it_beat(tmp_path, monkeypatch):
    """Heuristics may change after a measurement: then it says nothing of the new choice."""
    shape = Shape(8192, 640, 320, 8)
    usual = tuning.config("expand", shape, HOPPER)
    path = write_tiles(
        tmp_path, f"expand {shape.key}", replace(usual, stages=2), replace(usual, block_m=64)
    )
    monkeypatch.setattr(tables, "USER_TABLES", path.parent)
    tables.reload()
    assert tables.tiles("expand", shape, HOPPER) == (usual, "default")
    tables.reload()


def test_an_entry_that_nothing_won_is_no_choice(tmp_path, monkeypatch):
    shape = Shape(8192, 640, 320, 8)
    usual = tuning.config("expand", shape, HOPPER)
    path = write_tiles(tmp_path, f"expand {shape.key}", usual, usual)
    monkeypatch.setattr(tables, "USER_TABLES", path.parent)
    tables.reload()
    assert tables.tiles("expand", shape, HOPPER) == (usual, "default")
    tables.reload()


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("expand 8192 640 320 8 bfloat16", {"warps": 3}, "powers of two, tiles from 16"),
        ("expand 8192 640 320 8 bfloat16", {"block_m": 48}, "powers of two, tiles from 16"),
        ("expand 8192 640 320 8 bfloat16", {"block_m": "64"}, "integers for block_k, block_m"),
        ("weight_only_int4 8192 640 320 8 bfloat16", {"block_k": 16}, "block_k from 32"),
        ("matvec_int8 1 640 320 8 bfloat16", {"block_k": 8}, "tiles from 1, block_k from 16"),
        ("expand 8191 640 320 8 bfloat16", {}, "is no key"),
        ("other 8192 640 320 8 bfloat16", {}, "is no key"),
    ],
)
def test_bad_tiles_are_refused_at_load(tmp_path, monkeypatch, key, change, message):
    usual = tuning.config("expand", Shape(8192, 640, 320, 8), HOPPER)
    path = write_tiles(tmp_path, key, replace(usual, **change), usual)
    monkeypatch.setattr(tables, "USER_TABLES", path.parent)
    tables.reload()
    with pytest.raises(ValueError) as refusal:
        tuning.config("shrink", Shape(64, k=64, r=8), HOPPER)
    assert str(path) in str(refusal.value) and key in str(refusal.value)
    assert message in str(refusal.value)
    tables.reload()


def write_tiles(folder, key, chosen, usual):
    ms = {"chosen": [1, 1, 1], "usual": [2, 2, 2]}
    entry = {"chosen": asdict(chosen), "usual": asdict(usual), "ms": ms, "rounds": 3}
    entry |= {"torch": "2", "triton": "3", "date": "2026-01-01"}
    path = folder / "sm_90.json"
    tables.write(path, {"strategies": {}, "tiles": {key: entry}})
    return path


def test_shipped_tables_are_read():
    for path in tables.SHIPPED_TABLES.glob("sm_*.json"):
        assert tables.read(path, CHIPS[path.stem])["tiles"]


@pytest.mark.parametrize(
    ("shape", "drops", "wanted"),
    [
        (Shape(1, 4096, 4096, 16), False, "split"),  # decoding, without a dot
        (Shape(4, 512, 4096, 64), False, "split"),
        (Shape(5, 4096, 4096, 16), False, "one_pass"),
        (Shape(8, 4096, 4096, 8), False, "one_pass"),
        (Shape(64, 4096, 4096, 32), False, "one_pass"),
        (Shape(8, 4096, 4096, 64), False, "split"),  # A read 128 times: 134 MB beside W's 34
        (Shape(8, 512, 4096, 64), False, "one_pass"),  # a launch is more
        (Shape(8192, 512, 4096, 16), False, "vendor"),  # one wave of tiles: nothing overlaps
        (Shape(8192, 512, 1024, 16), False, "split"),  # so short a sum that y is worth more
        (Shape(8192, 1024, 4096, 16), True, "split"),  # a grouped-query k or v: two waves
        (Shape(8192, 4096, 1024, 16), True, "split"),
        (Shape(8192, 4096, 4096, 16), False, "split"),
        (Shape(2048, 11008, 4096, 16), False, "vendor"),  # the last of six waves is a fifth full
        (Shape(8192, 4096, 4096, 256), False, "vendor"),  # so wide a term leaves a small tile
        (Shape(8, 4096, 4096, 128), False, "split"),  # too large a rank for a second accumulator
        (Shape(8192, 4096, 512, 16, torch.float32), False, "vendor"),
    ],
    ids=str,
)
def test_lora_strategy(shape, drops, wanted):
    strategy, reason = tuning.choose_lora(shape, drops, HOPPER)
    assert strategy == wanted
    assert reason and not reason.endswith(".") and "\n" not in reason


@pytest.mark.parametrize(
    ("shape", "trains", "wanted"),
    [
        (Shape(16, 4096, 4096, 64), False, "plain"),  # F costs more than 16 rows can save
        (Shape(32768, 4096, 1024, 64), True, "folded"),
        (Shape(32768, 14336, 4096, 64), True, "folded"),
        (Shape(2048, 11008, 4096, 64), True, "folded_vendor"),
        (Shape(32768, 4096, 14336, 64), True, "plain"),  # x is so wide that y0 is the cheaper read
    ],
    ids=str,
)
def test_adapter_strategy(shape, trains, wanted):
    assert tuning.choose_adapter(shape, trains, HOPPER)[0] == wanted


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        (Shape(65536, k=2048, r=64), "row_block"),
        (Shape(16384, k=2048, r=64), "two_launch"),
        (Shape(65536, k=2048, r=512), "two_launch"),
    ],
    ids=str,
)
def test_bottleneck_strategy(shape, wanted):
    assert tuning.choose_bottleneck(shape, False, HOPPER)[0] == wanted


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        (Shape(65536, k=2048, r=64), "row_block"),
        (Shape(2048, k=4096, r=16), "two_launch_one_read"),  # few parts of a narrow dU
        (Shape(2048, k=4096, r=64), "two_launch"),  # parts of a wide one outweigh dY
        (Shape(64, k=2048, r=16), "two_launch"),  # a launch outweighs everything
        (Shape(2048, k=4096, r=512), "two_launch"),
    ],
    ids=str,
)
def test_bottleneck_strategy_in_training(shape, wanted):
    strategy, reason = tuning.choose_bottleneck(shape, True, HOPPER)
    assert strategy == wanted and ("together" in reason) == ("one_read" not in wanted)


def test_bytes_of_a_bottlenecks_gradients():
    """At 2,048 rows of 4,096 and width 64: dY and h again and 2 × 4 parts, or 16 + 8 + 1 parts."""
    shape, part = Shape(2048, k=4096, r=64), 8 * 4096 * 64
    joint, apart = (tuning.bottleneck_gradient_bytes(shape, one, HOPPER) for one in (False, True))
    assert joint == pytest.approx(2 * 2048 * (4096 + 128) + 2 * 4.125 * part)
    assert apart == pytest.approx((16 + 8 + 1) * part + 8e6)


WIDE = Shape(8192, 11008, r=64)


def test_bytes_behind_an_output():
    """A part of dB for every 128 rows, or dY again and as many parts as give two programs each."""
    part, programs = 8 * 11008 * 64, 11008 / 128  # the 86 tiles of a width of 64
    once, twice = (tuning.expand_gradient_bytes(WIDE, one, HOPPER) for one in (True, False))
    assert once == 8192 / 128 * part
    assert twice == 2 * 8192 * 11008 + 2 * part + 8e6 and 2 * programs < 2 * 132 < 4 * programs
    assert twice < once and not tuning.one_read(WIDE, HOPPER)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"r": 16}, True),
        ({"r": 32}, True),  # as many bytes, and a launch less
        ({"r": 48}, False),
        ({"m": 128}, True),  # one part: nothing to save
        ({"m": 128, "r": 128}, False),  # does not fit the registers
        ({"dtype": torch.float32}, False),  # twice the bytes of dY, and twice the parts
        ({"dtype": torch.float32, "r": 16}, True),
    ],
    ids=str,
)
def test_one_read_of_dy_or_two(change, wanted):
    assert tuning.one_read(WIDE._replace(**change), HOPPER) == wanted


def test_public_choices_take_a_device():
    cpu = torch.device("cpu")
    one = tuning.lora_strategy(8192, 4096, 4096, 16, False, torch.bfloat16, cpu)
    assert one == tuning.choose_lora(Shape(8192, 4096, 4096, 16), False, chip(cpu))
    one = tuning.adapter_strategy(8192, 1024, 4096, 64, True, torch.bfloat16, cpu)
    assert one == tuning.choose_adapter(Shape(8192, 4096, 1024, 64), True, chip(cpu))
    one = tuning.bottleneck_strategy(8192, 1024, 64, True, torch.bfloat16, cpu)
    assert one == tuning.choose_bottleneck(Shape(8192, k=1024, r=64), True, chip(cpu))


def test_a_rank_is_covered():
    assert [tiling.whole_rank(r) for r in (1, 8, 16, 17, 64, 300)] == [16, 16, 16, 32, 64, 512]
    assert [tiling.rank_block(r, 32) for r in (1, 16, 17, 64)] == [16, 16, 32, 32]


def test_launches_are_those_that_the_budget_compiles(monkeypatch):
    """The lookups of the fused paths name every fact that a configuration depends on."""
    asked = set()

    def recorded(kernel, shape, on):
        asked.add((kernel, shape))
        return tiling.heuristic(kernel, shape, on)

    monkeypatch.setattr(tuning, "config", recorded)
    x, weight, dy = torch.randn(20, 34), torch.randn(36, 34), torch.randn(20, 36)
    a, b, by = torch.randn(8, 34), torch.randn(36, 8), (0.3, torch.tensor([5]))
    for strategy in ("split", "vendor"):
        _, s = fused.forward(x, weight, a, b, None, 1.0, None, *by, strategy)
        fused.backward(
            dy, x, weight, a, b, s, 1.0, None, *by, strategy, (True, True, True, False, False)
        )
    fp32 = {"m": 20, "r": 8, "dtype": torch.float32}
    assert asked == {
        ("shrink", Shape(k=34, masked=True, **fp32)),
        ("expand", Shape(n=36, k=34, **fp32)),
        ("update", Shape(n=36, **fp32)),
        ("expand_backward", Shape(n=36, **fp32)),
        ("shrink_backward", Shape(k=34, masked=True, **fp32)),
        ("expand", Shape(n=34, k=36, masked=True, **fp32)),
        ("update", Shape(n=34, masked=True, **fp32)),
    }
