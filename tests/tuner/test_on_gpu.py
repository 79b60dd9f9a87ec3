"""Where and how `tune` times calls on a GPU: told by what it asks of torch, with no GPU here."""

import pytest
import torch

import artemis_kernels
from artemis_kernels.core import device as device_facts
from artemis_kernels.core.device import CHIPS, Chip
from artemis_kernels.tuner import search, tiles, timing


def test_a_call_on_a_gpu_is_enqueued_before_it_is_timed(monkeypatch):
    """Milliseconds of writes come first: 64 of 268 MB are 2 ms at 8 TB/s."""
    done = []

    class Buffer:
        def zero_(self):
            done.append("write")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, end):
            return 1.0

    monkeypatch.setattr(timing.torch, "empty", lambda size, **options: Buffer())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    elapsed = timing._on_gpu(torch.device("cuda"))
    assert elapsed(lambda turn: done.append(f"call {turn}"), 3) == 1.0
    assert done[-4:] == ["event", "call 3", "event", "wait"]
    assert timing.FLUSHED * done.count("write") / 8e12 > 2e-3 and len(done) == 68


@pytest.fixture
def a_gpu(monkeypatch):
    """Two Hoppers, as far as torch and the tuner are asked; a list of what happens."""
    events = []

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            events.append(f"on {self.device}")

        def __exit__(self, *error):
            events.append("off")

    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(device_facts, "gpu_count", lambda: 2)
    monkeypatch.setattr(device_facts, "chip", lambda device: CHIPS["sm_90"])
    monkeypatch.setattr(tiles, "search", lambda *a, **options: events.append("tiles") or {})
    monkeypatch.setattr(
        search, "strategies", lambda *a, **options: events.append("strategies") or {}
    )
    yield events


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_all_is_timed_on_the_device_asked_for(device, a_gpu):
    """Triton launches on torch's current GPU, and events are recorded on its stream."""
    artemis_kernels.tune([(64, 96, 8)], [32], device=device)
    assert a_gpu == [f"on {device}", "tiles", "strategies", "off"]


def test_a_gpu_that_is_not_there_is_refused(a_gpu):
    for asked in (artemis_kernels.tune, artemis_kernels.choices):
        with pytest.raises(ValueError, match="'cuda:2' was asked for, and torch sees 2 GPUs"):
            asked([(64, 96, 8)], [32], device="cuda:2")
    assert not a_gpu


def test_a_gpu_that_no_kernel_runs_on_is_refused(a_gpu, monkeypatch):
    monkeypatch.setattr(device_facts, "chip", lambda device: Chip("sm_75", 40, 1 << 16))
    with pytest.raises(ValueError, match="cannot run on 'cuda': the kernels need sm_80"):
        artemis_kernels.tune([(64, 96, 8)], [32], dtype="float16", device="cuda")
