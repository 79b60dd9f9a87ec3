"""Times on a GPU, by a queue that stands for one: what they count, and which are compared."""

from types import SimpleNamespace

import pytest
import torch

from artemis.benchmark import timer as timing
from artemis.benchmark.timer import Timer

#: Milliseconds: Python's part of a call, of a graph's replay, and the kernel of either.
PYTHON, REPLAY, KERNEL = 0.05, 0.002, 0.01


class Gpu:
    """Work starts once Python has asked for it and what came before has ended."""

    def __init__(self):
        self.now = self.ends = 0.0  # Python's clock; when the queue runs empty

    def launch(self, python: float, kernel: float) -> None:
        self.now += python
        self.ends = max(self.ends, self.now) + kernel

    def synchronize(self) -> None:
        self.now = max(self.now, self.ends)


class Event:
    def __init__(self, gpu: Gpu):
        self.gpu, self.at = gpu, 0.0

    def record(self) -> None:
        self.at = max(self.gpu.now, self.gpu.ends)

    def synchronize(self) -> None:
        self.gpu.now = max(self.gpu.now, self.at)

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(gpu))
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    return gpu


@pytest.fixture
def timer(gpu) -> Timer:
    timer = Timer(torch.device("cpu"), rounds=3, flush=False)
    timer.on_gpu = True
    timer.flushed = SimpleNamespace(zero_=lambda: gpu.launch(0.005, 0.09))
    return timer


@pytest.fixture
def captured(gpu, monkeypatch) -> set:
    """The calls that can be captured."""
    found = set()

    def graph(call):
        return (lambda: gpu.launch(REPLAY, KERNEL)) if call in found else None

    monkeypatch.setattr(timing, "captured", graph)
    return found


def calls_of(gpu: Gpu, *names: str) -> dict:
    return {name: lambda name=name: gpu.launch(PYTHON, KERNEL) for name in names}


def test_a_call_as_it_is_takes_what_python_takes_too(gpu, timer, captured):
    """Writing the buffer takes longer than that, and would hide it."""
    calls = calls_of(gpu, "artemis")
    captured.update(calls.values())
    row = timer.rows(calls)["artemis"]
    assert row["eager_ms"]["p50"] == pytest.approx(PYTHON + KERNEL)
    assert row["ms"]["p50"] == row["graph_ms"]["p50"] == pytest.approx(KERNEL)
    assert row["graph"]


def test_one_call_without_a_graph_has_all_compared_as_they_are(gpu, timer, captured):
    calls = calls_of(gpu, "artemis", "peft")
    captured.add(calls["artemis"])
    rows = timer.rows(calls)
    assert all(row["ms"]["p50"] == pytest.approx(PYTHON + KERNEL) for row in rows.values())
    assert not any(row["graph"] for row in rows.values())
    assert rows["artemis"]["graph_ms"]["p50"] == pytest.approx(KERNEL)
    assert "graph_ms" not in rows["peft"]


def test_no_graph_where_none_is_asked_for(gpu, timer, captured):
    calls = calls_of(gpu, "artemis")
    captured.update(calls.values())
    row = timer.rows(calls, graphs=False)["artemis"]
    assert row["ms"] == row["eager_ms"] and not row["graph"] and "graph_ms" not in row


def test_peaks_are_free_of_launches(gpu, timer):
    """Else nothing would reach the floor that is made of them."""
    assert timer.best(calls_of(gpu, "copy")["copy"]) == pytest.approx(KERNEL / 1e3)
