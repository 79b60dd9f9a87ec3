"""What the cost model charges a group for, against what its members alone would pay."""

import pytest

from bench import cost_model
from bench.cost_model import BLOCK, GPUS

GPU = {gpu.name: gpu for gpu in GPUS}["H100"]


@pytest.mark.parametrize(("format", "moved", "launches"), [("fp8", 3, 1), ("int8", 5, 3)])
def test_a_group_rounds_x_once(format, moved, launches, monkeypatch):
    """q, k, v save two roundings of x, gate and up one: `moved` bytes an element."""
    rows = 8192

    def over_16_bits() -> float:
        packed, plain = (cost_model.hybrid_step(GPU, rows, one) for one in (format, "16-bit"))
        return packed - plain

    grouped = over_16_bits()
    alone = tuple((k, (n,)) for k, outs in BLOCK for n in outs)
    monkeypatch.setattr(cost_model, "BLOCK", alone)
    saved = 3 * (moved * rows * 4096 / (0.9 * 3.35e12) + launches * 3e-6)
    assert over_16_bits() - grouped == pytest.approx(saved)
