"""The worker: a step for which memory does not suffice ends by itself."""

from types import SimpleNamespace

import pytest
import torch

from artemis.benchmark import worker
from artemis.benchmark.models import Cell
from artemis.benchmark.steps import Prepared, Step

CELL = Cell("64x2", 2, 96, 2, 16, whole=True)


def of_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def of_cpu() -> None:
    torch.empty(2**60, dtype=torch.uint8)


refused = pytest.mark.parametrize("allocate", [of_gpu, of_cpu])


def job(workload: str, *arms: str) -> dict:
    steps = [Step(workload, arm, CELL).to_dict() for arm in arms]
    return {"steps": steps, "check": [], "rounds": 4, "warmup": 1}


@refused
@pytest.mark.parametrize("call", [0, 1, 3])
def test_a_step_ends_at_the_call_that_finds_no_memory(monkeypatch, call, allocate):
    """The 0th: building it. What was timed before stays, and the other step has all its rounds."""
    calls = {"full-bf16": 0, "hybrid": 0}

    def prepare(step: Step) -> Prepared:
        def run() -> None:
            if step.arm == "hybrid" and calls[step.arm] == call:
                allocate()
            calls[step.arm] += 1

        run()
        return Prepared(run, 1, SimpleNamespace(trained_parameters=1))

    monkeypatch.setattr("artemis.benchmark.worker.prepare", prepare)
    lines = list(worker.run(job("train", "full-bf16", "hybrid")))
    rounds = [sum("ms" in line for line in lines if line["step"] == step) for step in (0, 1)]
    assert rounds == [4, max(call - 2, 0)]  # one was building it, one warming up
    assert [line for line in lines if "failed" in line] == [{"step": 1, "failed": "out of memory"}]
    assert calls["full-bf16"] == 6


@refused
def test_a_peak_beyond_the_memory_is_no_figure(monkeypatch, allocate):
    monkeypatch.setattr("artemis.benchmark.worker.measure_memory", lambda step: allocate())
    assert list(worker.run(job("memory", "hybrid"))) == [{"step": 0, "failed": "out of memory"}]


@pytest.mark.parametrize("place", ["prepare", "measure_memory"])
def test_another_error_is_a_fault(monkeypatch, place):
    def fails(step: Step):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(f"artemis.benchmark.worker.{place}", fails)
    with pytest.raises(RuntimeError, match="multiplied"):
        list(worker.run(job("memory" if place == "measure_memory" else "train", "hybrid")))


@pytest.mark.parametrize("count", [1, 16])
def test_a_round_of_several_pieces_is_the_time_of_one(monkeypatch, count):
    """Decoding runs sixteen tokens a round, and a row says what one takes."""
    prepared = Prepared(lambda: None, count, SimpleNamespace(trained_parameters=1))
    monkeypatch.setattr("artemis.benchmark.worker.prepare", lambda step: prepared)
    monkeypatch.setattr(
        "artemis.benchmark.worker.in_turns",
        lambda providers, rounds: ((r, name, 32.0) for r in range(rounds) for name in providers),
    )
    lines = list(worker.run(job("decode", "hybrid")))
    assert [line["ms"] for line in lines if "ms" in line] == [32.0 / count] * 4
