"""Groups measured: what is wrong is not timed, and what they must move is counted once."""

from functools import partial

import pytest
import torch

import artemis_kernels
from artemis.benchmark import groups, peers
from artemis.benchmark.operations import OPERATIONS, Sizes
from artemis.benchmark.timer import Timer

CPU = torch.device("cpu")
LORA, ADAPTER, _ = OPERATIONS
SIZES = (Sizes(40, 64, 48, 8), Sizes(40, 64, 32, 8))
PEAKS = {"gflops": 1.0, "gbs": 1e-3}


def rows(operation, which="both", dropout=0.1) -> dict[str, dict]:
    group = groups.Group(operation, SIZES, dropout, which, "layers")
    found = groups.measure(group, torch.float32, CPU, Timer(CPU, 1, flush=False), PEAKS)
    return {row["provider"]: row for row in found}


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(peers, "can_compile", lambda device: False)
    monkeypatch.setattr(groups, "can_compile", lambda device: False)


@pytest.mark.parametrize("operation", [LORA, ADAPTER], ids=lambda op: op.name)
@pytest.mark.parametrize("which", ["forward", "backward", "both"])
def test_everybody_is_right_and_timed(operation, which):
    found = rows(operation, which)
    expected = {"artemis", "artemis, one by one", "artemis, int8", "plain", "addmm", "bare"}
    assert set(found) == expected | ({"peft"} if operation is LORA else set())
    assert all(row["gate"]["passed"] and row["ms"]["p50"] > 0 for row in found.values())
    timed = [found[name]["ms"]["p50"] for name in peers.PEERS if name in found]
    assert found["artemis"]["over_best_peer"] == found["artemis"]["ms"]["p50"] / min(timed)


@pytest.mark.parametrize("operation", [LORA, ADAPTER], ids=lambda op: op.name)
def test_a_forward_without_dropout_is_timed_from_constants_too(operation):
    found = rows(operation, "forward", dropout=0.0)
    frozen = {name: row for name, row in found.items() if name.endswith("frozen")}
    assert frozen.keys() == {"artemis, frozen", "artemis, int8, frozen"}
    assert all(row["gate"]["passed"] and row["ms"]["p50"] > 0 for row in frozen.values())
    assert not any(name.endswith("frozen") for name in rows(operation, "forward"))


def louder(x, weights, first, second, scales, run, **options):
    """Its small term a hundredth too large."""
    return run(x, weights, first, second, scales=[1.01 * scale for scale in scales], **options)


def deaf(x, weights, first, second, scales, run, **options):
    """The last member's part of dX is dropped: right outputs, and fast."""
    members = zip(weights, first, second, scales, strict=True)
    xs = [x] * (len(weights) - 1) + [x.detach()]
    return [run(x, [w], [a], [b], scales=[s], **options)[0]
            for x, (w, a, b, s) in zip(xs, members, strict=True)]  # fmt: skip


@pytest.mark.parametrize("fault", [louder, deaf])
@pytest.mark.parametrize("operation", [LORA, ADAPTER], ids=lambda op: op.name)
def test_what_is_wrong_is_not_timed(operation, fault, monkeypatch):
    name = f"{operation.name}_group"
    wrong = partial(fault, run=getattr(artemis_kernels, name))
    monkeypatch.setattr(artemis_kernels, name, wrong)
    found = rows(operation)
    assert "ms" not in found["artemis"] and not found["artemis"]["gate"]["passed"]
    assert found["artemis, one by one"]["gate"]["passed"]


def test_a_group_reads_x_once():
    """Bare products: two floats moved per multiplied matrix, x and dX once for both layers."""
    row = rows(LORA)["bare"]
    x, weights, ys = 40 * 64, 64 * (48 + 32), 40 * (48 + 32)
    moved = 4 * (2 * x + 2 * weights + 2 * ys)
    assert row["gbs"] * row["ms"]["p50"] / 1e3 * 1e9 == pytest.approx(moved)
    assert row["intensity"] == pytest.approx(2 * 2 * 40 * weights / moved)
