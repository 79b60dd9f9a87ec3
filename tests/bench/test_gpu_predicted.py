"""What was predicted stands beside what was measured: for every prediction there is a workload."""

import pytest

from bench import cost_model, predictions
from bench.cost_model import BLOCK, GPUS, Case
from bench.gpu import groups, models, operations, packed, predicted
from bench.gpu.summary import summary

H200 = predicted.gpu_named("NVIDIA H200")
HEADER = {
    "gpu": {"name": "NVIDIA H200", "driver": "1"}, "versions": {}, "commit": None, "dirty": None,
    "code": "c0de", "time": "now", "run": "a",
}  # fmt: skip


def test_a_gpu_is_known_by_its_drivers_name():
    assert H200.name == "H200" and predicted.gpu_named("NVIDIA A100-SXM4-80GB") is None


def test_every_predicted_layer_is_measured():
    singles = {
        (work.sizes.m, work.sizes.k, (work.sizes.n,), work.dropout > 0)
        for work in operations.workloads(tiny=False)
        if work.operation.name == "lora_linear" and work.which == "both" and work.sizes.r == 16
    }
    joined = {
        (work.rows, work.k, work.outs, work.dropout > 0)
        for work in groups.workloads(tiny=False)
        if work.members == "lora" and work.r == 16
    }
    wanted = {(case.rows, case.k, case.outs, case.dropout) for case in predictions.CASES}
    assert wanted <= singles | joined


def test_every_predicted_block_is_measured():
    forward = {(w.rows, w.k, w.n) for w in packed.workloads(tiny=False) if not w.backward}
    layers = {(k, n) for k, outs in BLOCK for n in outs}
    assert {(rows, *layer) for rows in predictions.PACKED_ROWS for layer in layers} <= forward
    wide = [each for each in models.cells(tiny=False) if each[1].model == "llama-2-7b"]
    trained = {b * cell.sequence for (of, _), cell, each in wide if of == "train" for b in each}
    assert set(predictions.TRAINING_ROWS) <= trained
    ((_, arms), _, batches), *_ = [each for each in wide if each[0][0] == "decode"]
    formats = {predicted._FORMATS[arm] for arm in arms if arm.startswith("hybrid")}
    assert 1 in batches and formats >= set(cost_model.FORMATS) - {"fp8"}  # as int8


def row_of(kind: str, provider: str, **about) -> dict:
    return {"kind": kind, "provider": provider, "ms": {"p50": 2.0}, **about}


CASE = Case("", 8192, 4096, (4096,), True)
LAYER = {
    "op": "lora_linear", "m": 8192, "k": 4096, "n": 4096, "r": 16, "dropout": 0.1, "pass": "both"
}  # fmt: skip
QKV = Case("", 1024, 8192, (8192, 1024, 1024), False)
GROUP = {
    "members": "lora",
    "rows": 1024,
    "k": 8192,
    "outs": [8192, 1024, 1024],
    "r": 16,
    "dropout": 0.0,
}
PACKED = {"rows": 1, "k": 4096, "n": 11008, "backward": False}


@pytest.mark.parametrize(
    ("row", "seconds"),
    [
        (row_of("kernel", "artemis", **LAYER), cost_model.artemis(H200, CASE)),
        (row_of("kernel", "peft", **LAYER), cost_model.peft(H200, CASE)),
        (row_of("kernel", "bare", **LAYER), cost_model.bare(H200, CASE)),
        (row_of("kernel", "plain", **LAYER), None),
        (row_of("kernel", "artemis/split", **LAYER), None),
        (row_of("kernel", "artemis", **LAYER | {"r": 64}), None),
        (row_of("group", "artemis, group", **GROUP), cost_model.artemis(H200, QKV)),
        (row_of("group", "artemis, one by one", **GROUP), None),
        (row_of("packed", "bare", **PACKED), H200.product(1, 4096, 11008)),
        (
            row_of("packed", "artemis, int4", **PACKED),
            cost_model.layer(H200, 1, 4096, 11008, "int4"),
        ),
        ({"kind": "loss", "provider": "torch", "ms": {"p50": 2.0}}, None),
    ],
    ids=lambda given: given["kind"] + " " + given["provider"] if isinstance(given, dict) else "",
)
def test_a_time_stands_beside_its_prediction(row, seconds):
    found = predicted.compared(row, H200)
    if seconds is None:
        assert found == {}
    else:
        assert found["predicted"] == pytest.approx(1e3 * seconds)
        assert found["over_predicted"] == pytest.approx(2.0 / (1e3 * seconds))
    assert predicted.compared({n: v for n, v in row.items() if n != "ms"}, H200) == {}


def test_speeds_of_models_are_compared_by_what_the_gpu_did():
    train = {
        "kind": "train", "model": "llama-2-7b", "arm": "hybrid-int8", "tokens": 8192,
        "ms": {"p50": 9.0}, "speedup": {"full-bf16": {"p50": 1.1}},
        "busy_speedup": {"full-bf16": 1.9},
    }  # fmt: skip
    speed = cost_model.full_step(H200, 8192) / cost_model.hybrid_step(H200, 8192, "int8")
    assert predicted.compared(train, H200)["over_predicted"] == pytest.approx(1.9 / speed)
    decode = train | {"kind": "decode", "arm": "hybrid-int4", "tokens": 1}
    del decode["busy_speedup"]
    (documented,) = [
        line for line in predictions.decoding([]).splitlines() if line.startswith("| int4")
    ]
    of_h200 = float(documented.split("|")[2 + [gpu.name for gpu in GPUS].index("H200")])
    found = predicted.compared(decode, H200)
    assert found["predicted"] == pytest.approx(of_h200, abs=0.005)
    assert found["over_predicted"] == pytest.approx(1.1 / found["predicted"])
    assert predicted.compared(decode | {"model": "llama-3.2-1b"}, H200) == {}


def test_the_summary_shows_predictions_and_the_rates_they_took():
    peaks = {"kind": "peaks", "gflops": 788e3, "gbs": 4300.0}
    rows = {"kernels": [peaks, row_of("kernel", "artemis", **LAYER)]}
    text = summary(HEADER, {"kernels": "passed"}, rows)
    assert "copy 0.90 (predicted with 0.90), products in 16 bits 0.80 (predicted with 0.73)" in text
    assert f"{1e3 * cost_model.artemis(H200, CASE):.4g}" in text
    assert "commit unknown, code c0de" in text
    other = HEADER | {"gpu": {"name": "NVIDIA A100", "driver": "1"}}
    assert "predicted with" not in summary(other, {"kernels": "passed"}, rows)
