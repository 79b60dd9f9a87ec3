"""One operation measured: who is timed, how packed weights are judged, what the floor counts."""

from typing import NamedTuple

import pytest
import torch

from artemis.benchmark import groups, packed, peers
from artemis.benchmark.costs import PASSES, cost_of_pass
from artemis.benchmark.measure import measure
from artemis.benchmark.operations import OPERATIONS, Operation, Sizes, Truth, operands
from artemis.benchmark.timer import Timer
from artemis_kernels import Cost, FrozenAdapter, QuantizedWeight

CPU = torch.device("cpu")
LORA, ADAPTER, BOTTLENECK = OPERATIONS
LEARN = {"lora_linear": ("x", "lora_a", "lora_b"), "adapter_linear": ("x", "down", "up")}


class Work(NamedTuple):
    operation: Operation = LORA
    sizes: Sizes = Sizes(40, 64, 48, 8)
    dropout: float = 0.0
    which: str = "both"
    name: str = "a layer"


def wrong(work, tensors, dropout):
    """Two more ways of Artemis: one off by a hundredth in its small term, one that fails."""

    def off(t):
        return LORA.public(t | {"scale": 1.01}, impl="reference")

    def failing(t):
        raise RuntimeError("no such kernel")

    return {"artemis/off": off, "artemis/failing": failing}


def test_what_is_wrong_or_fails_is_not_timed(monkeypatch):
    monkeypatch.setattr(peers, "can_compile", lambda device: False)
    peaks = {"gflops": 1.0, "gbs": 1.0}
    found = measure(Work(), torch.float32, CPU, Timer(CPU, 1, flush=False), peaks, more=wrong)
    rows = {row["provider"]: row for row in found}
    assert {name for name, row in rows.items() if "ms" not in row} == {
        "artemis/off", "artemis/failing"
    }  # fmt: skip
    assert rows["artemis/failing"]["gate"]["where"] == "RuntimeError: no such kernel"
    timed = [rows[name]["ms"]["p50"] for name in ("plain", "addmm", "peft")]
    assert rows["artemis"]["over_best_peer"] == rows["artemis"]["ms"]["p50"] / min(timed)
    assert {"artemis, int8", "artemis, int4", "bare"} <= rows.keys()


def test_what_has_no_memory_is_not_known_to_be_wrong(monkeypatch):
    monkeypatch.setattr(peers, "can_compile", lambda device: False)

    def without_memory(work, tensors, dropout):
        def run(t):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return {"artemis/large": run}

    timer, peaks = Timer(CPU, 1, flush=False), {"gflops": 1.0, "gbs": 1.0}
    found = measure(Work(), torch.float32, CPU, timer, peaks, more=without_memory)
    rows = {row["provider"]: row for row in found}
    assert rows["artemis/large"]["gate"]["passed"] is None and "ms" not in rows["artemis/large"]
    assert rows["artemis"]["ms"]["p50"] > 0


def inferred(operation: Operation, **work) -> dict[str, dict]:
    """Rows of what computes a layer from constants."""
    timer, peaks = Timer(CPU, 1, flush=False), {"gflops": 1.0, "gbs": 1.0}
    found = measure(
        Work(operation, **work), torch.bfloat16, CPU, timer, peaks, compiles=False
    )  # fmt: skip
    return {row["provider"]: row for row in found if row["provider"].endswith("frozen")}


@pytest.mark.parametrize("operation", [LORA, ADAPTER], ids=lambda op: op.name)
def test_a_forward_without_dropout_is_timed_from_constants_too(operation):
    rows = inferred(operation, which="forward", sizes=Sizes(2, 64, 96, 8))
    assert rows.keys() == {f"artemis{held}, frozen" for held in ("", ", int8", ", int4")}
    assert all(row["gate"]["passed"] and row["ms"]["p50"] > 0 for row in rows.values())
    # The packed weight's own bytes: x, y and a scale a row beside, which are few.
    moved = {name: row["gbs"] * row["ms"]["p50"] for name, row in rows.items()}
    assert moved["artemis, int4, frozen"] < moved["artemis, int8, frozen"]
    assert moved["artemis, int8, frozen"] < 0.75 * moved["artemis, frozen"]
    assert not inferred(operation, which="both") and not inferred(
        operation, which="forward", dropout=0.1
    )


def test_a_wrong_layer_at_inference_is_not_timed(monkeypatch):
    right = FrozenAdapter.lora
    monkeypatch.setattr(FrozenAdapter, "lora", lambda a, b: right(a, b, 1.1))
    rows = inferred(LORA, which="forward")
    assert len(rows) == 3 and not any(row["gate"]["passed"] or "ms" in row for row in rows.values())


@pytest.mark.parametrize("which", PASSES)
def test_a_backward_alone_is_captured_by_nobody(monkeypatch, which):
    """It belongs to the stream that its forward ran on."""
    asked = []

    class Asked(Timer):
        def rows(self, calls, graphs=True):
            asked.append(graphs)
            return super().rows(calls, graphs)

    for module in (peers, groups):
        monkeypatch.setattr(module, "can_compile", lambda device: False)
    timer, peaks = Asked(CPU, 1, flush=False), {"gflops": 1.0, "gbs": 1.0}
    list(measure(Work(which=which), torch.float32, CPU, timer, peaks))
    group = groups.Group(LORA, (Work().sizes,) * 2, 0.0, which, "layers")
    list(groups.measure(group, torch.float32, CPU, timer, peaks))
    assert asked == [which != "backward"] * 2


@pytest.mark.parametrize("compiles", [True, False])
def test_a_peer_that_breaks_when_it_is_timed_or_is_left_out(monkeypatch, compiles):
    """Peers draw masks of their own, and are checked without: the compiler is asked once more."""

    def breaks(t):
        raise RuntimeError("no code for it")

    def both(operation, sizes, tensors, dropout):
        plain = peers.plain(operation, dropout)
        return {"plain": plain, "compile": breaks if dropout else plain}

    monkeypatch.setattr("artemis.benchmark.prepare.peers", both)
    timer, peaks = Timer(CPU, 1, flush=False), {"gflops": 1.0, "gbs": 1.0}
    found = measure(Work(dropout=0.25), torch.float32, CPU, timer, peaks, compiles=compiles)
    rows = {row["provider"]: row for row in found}
    assert "ms" in rows["plain"] and ("compile" in rows) == compiles
    if compiles:
        assert rows["compile"]["gate"]["where"] == "RuntimeError: no code for it"
        assert "ms" not in rows["compile"] and not rows["compile"]["gate"]["passed"]


@pytest.mark.parametrize("operation", [LORA, ADAPTER], ids=lambda op: op.name)
@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_packed_weights_are_judged_by_the_weight_they_stand_for(operation, format):
    torch.manual_seed(0)
    tensors = operands(operation, Sizes(40, 64, 48, 8), torch.float32, CPU)
    tensors = {n: tensors[n] for n in ("weight", *LEARN[operation.name])}
    weight = QuantizedWeight.quantize(tensors["weight"], format)
    stands_for = {"weight": weight.dequantize(torch.float32)}
    truth = Truth(operation, tensors | stands_for, LEARN[operation.name])
    run = packed.provider(operation, weight, 0.0)
    assert packed.judge(operation, weight, run, truth).passed
    other = packed.provider(
        operation, QuantizedWeight.quantize(1.1 * tensors["weight"], format), 0.0
    )
    assert not packed.judge(operation, weight, other, truth).passed


def test_the_floor_of_a_packed_weight_counts_its_own_bytes():
    sizes, forward = Sizes(4, 64, 48, 8), Cost(1000, 500)
    dense = cost_of_pass(LORA, sizes, "artemis", forward, 2, "backward")
    held = cost_of_pass(LORA, sizes, "artemis", forward, 2, "backward", held=64 * 48)
    assert dense.bytes - held.bytes == 64 * 48 and dense.flops == held.flops


#: Of 4 rows, 64 inputs, 48 outputs and a rank of 8, in numbers of two bytes: the products of the
#: frozen layer; of the thin ones' forward; and the adapter's numbers.
FROZEN, THIN = 2 * 4 * 64 * 48, {LORA: 2 * 4 * 8 * (64 + 48), ADAPTER: 2 * 4 * 8 * (48 + 48)}
FACTORS = {LORA: 8 * (64 + 48), ADAPTER: 8 * (48 + 48)}
X, W, Y = 4 * 64, 64 * 48, 4 * 48
BARE = Cost(FROZEN, 2 * (X + W + Y))


@pytest.mark.parametrize(
    ("operation", "provider", "forward", "backward"),
    [
        *(
            # dY, W, x and the factors are read, dX and the factors' gradients written.
            (operation, "artemis", Cost(FROZEN + thin, 7000),
             Cost(FROZEN + 2 * thin, 2 * (Y + W + X + X + 2 * FACTORS[operation])))
            for operation, thin in THIN.items()
        ),
        (BOTTLENECK, "artemis", Cost(THIN[ADAPTER], 7000),
         Cost(2 * THIN[ADAPTER], 2 * (Y + Y + Y + 2 * FACTORS[ADAPTER]))),
        (LORA, "bare", BARE, BARE),
    ],
    ids=["lora_linear", "adapter_linear", "bottleneck_adapter", "bare"],
)  # fmt: skip
def test_what_a_pass_must_compute_and_move(operation, provider, forward, backward):
    sizes = Sizes(4, 48 if operation is BOTTLENECK else 64, 48, 8)
    said = Cost(1, 2) if provider == "bare" else forward  # `explain` speaks of the operation
    found = [cost_of_pass(operation, sizes, provider, said, 2, which) for which in PASSES]
    assert found == [forward, backward, forward + backward]
