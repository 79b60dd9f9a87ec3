"""What Python costs, told apart from what a GPU does: graphs of a token, a step's busy time."""

import pytest
import torch

from artemis.benchmark.decoding import NEW_TOKENS
from artemis.benchmark.timer import Timer
from bench.gpu import busy, decoding, models

CPU = torch.device("cpu")
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


class Rewound:
    """A token of so many milliseconds, of which a graph leaves one."""

    def __init__(self, ms: float):
        self.ms, self.left = ms, 0

    def rewind(self):
        self.left = NEW_TOKENS

    def __call__(self):
        assert self.left > 0, "past the end of the cache"
        self.left -= 1
        return self.ms


@pytest.fixture
def in_turns(monkeypatch):
    """`decoding.in_turns` with a clock that adds up what calls say, and graphs of some arms."""

    def run(tokens: dict[str, Rewound], without_a_graph: tuple[str, ...]):
        def graph(token):
            token()
            return None if token in [tokens[arm] for arm in without_a_graph] else lambda: 1.0

        timer, spent = Timer(CPU, rounds=4, flush=False), []
        timer.on_gpu = True
        each = decoding._each

        def counted(tokens, steps, timer, idle):
            timed = {arm: lambda call=call: spent.append(call()) for arm, call in steps.items()}
            return each(tokens, timed, timer, idle)

        def milliseconds(call, idle=True):
            spent.clear()
            call()
            return sum(spent)

        monkeypatch.setattr(decoding, "captured", graph)
        monkeypatch.setattr(decoding, "_each", counted)
        monkeypatch.setattr(Timer, "milliseconds", lambda self, call, idle: milliseconds(call))
        return decoding.in_turns(tokens, timer)

    return run


def test_a_token_is_timed_as_a_graph_and_as_it_is(in_turns):
    times, rows = in_turns({"full-bf16": Rewound(9.0), "hybrid": Rewound(12.0)}, ())
    assert times == {"full-bf16": [1.0] * 4, "hybrid": [1.0] * 4}
    assert rows["hybrid"]["graph"] and rows["hybrid"]["eager_ms"]["p50"] == 12.0
    assert models._speedup(times, "hybrid")["full-bf16"]["p50"] == 1.0


def test_one_arm_without_a_graph_has_all_compared_as_they_are(in_turns):
    times, rows = in_turns({"full-bf16": Rewound(9.0), "hybrid": Rewound(12.0)}, ("hybrid",))
    assert not any(row["graph"] for row in rows.values())
    assert rows["full-bf16"]["graph_ms"]["p50"] == 1.0 and "graph_ms" not in rows["hybrid"]
    assert models._speedup(times, "hybrid")["full-bf16"]["p50"] == 9.0 / 12.0


def test_a_gpu_is_busy_once_where_kernels_overlap():
    assert busy.covered([(5, 9), (0, 2), (1, 3), (6, 7)]) == 3 + 4
    assert busy.covered([]) == 0


class Event:
    def __init__(self, name, start, end, device_type, is_user_annotation=False):
        self.name, self.time_range = name, type("Range", (), {"start": start, "end": end})
        self.device_type, self.is_user_annotation = device_type, is_user_annotation


@pytest.mark.parametrize(
    ("seen", "work"),
    [
        ("kernels", (0.009, [("_expand", 2, 0.007), ("gemm", 1, 0.004)])),
        ("nothing", None),
        ("no profiler", None),
    ],
)
def test_busy_time_is_that_of_kernels_alone(monkeypatch, seen, work):
    """Annotations span what they are about, gaps and all; kernels of two streams overlap."""
    gpu, cpu = busy.DeviceType.CUDA, busy.DeviceType.CPU
    kernels = [
        Event("_expand", 0, 3, gpu), Event("_expand", 6, 10, gpu), Event("gemm", 8, 12, gpu),
        Event("note", 0, 50, gpu, True), Event("gemm", 0, 90, cpu),
    ]  # fmt: skip

    class Profile:
        def __init__(self, activities):
            if seen == "no profiler":
                raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def events(self):
            return kernels if seen == "kernels" else []

    monkeypatch.setattr(busy, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert busy.work_of(lambda: None) == work


def test_a_row_says_how_long_its_gpu_was_busy(monkeypatch):
    kernels = [("gemm", 1, 2.0)]
    found = {"full-bf16": busy.Work(8.0, []), "hybrid": busy.Work(2.0, kernels), "peft": None}
    monkeypatch.setattr(models, "work_of", lambda call: found[call])
    times = {arm: [10.0] * 3 for arm in found}
    rows = models._worked({arm: arm for arm in found}, times)
    assert rows["hybrid"] == {
        "busy_ms": 2.0, "busy_share": 0.2, "busy_speedup": {"full-bf16": 4.0}, "kernels": kernels
    }  # fmt: skip
    assert "peft" not in rows


def test_a_row_says_what_a_step_takes_as_a_graph(monkeypatch):
    graphs = {"full-bf16": lambda: 4.0, "hybrid": lambda: 1.0, "peft": None}
    monkeypatch.setattr(models, "captured", lambda call: graphs[call])
    monkeypatch.setattr(Timer, "milliseconds", lambda self, call, idle: call())
    rows = models._replayed({arm: arm for arm in graphs}, Timer(CPU, 3, flush=False))
    assert rows["hybrid"]["graph_ms"]["p50"] == 1.0
    assert rows["hybrid"]["graph_speedup"]["full-bf16"]["p50"] == 4.0
    assert rows.keys() == {"full-bf16", "hybrid"}


def test_an_arm_without_memory_at_one_batch_is_timed_at_the_others(monkeypatch):
    monkeypatch.setattr(models, "TRAINING", ("full-bf16", "hybrid"))
    monkeypatch.setattr(models, "DECODING", ())
    monkeypatch.setattr(models, "_checked", lambda *given: {"passed": True})
    usual = models._prepared

    def prepared(workload, arm, cell):
        found = usual(workload, arm, cell)
        if arm == "hybrid":
            found.step.model.register_forward_pre_hook(refuse_one_sequence, with_kwargs=True)
        return found

    def refuse_one_sequence(module, args, kwargs):
        if kwargs["input_ids"].shape == (1, 16):
            raise NO_MEMORY

    monkeypatch.setattr(models, "_prepared", prepared)
    (cell, batches), *_ = [(c, b) for (of, _), c, b in models.cells(tiny=True) if of == "train"]
    assert 1 in batches and cell.sequence == 16
    rows = {
        (row["arm"], row["tokens"]): row for row in models.models(CPU, tiny=True, rounds=1)
    }  # fmt: skip
    assert rows["hybrid", 16]["passed"] is None and "ms" not in rows["hybrid", 16]
    assert rows["full-bf16", 16]["ms"]["p50"] > 0
    assert rows["hybrid", 32]["speedup"]["full-bf16"]["p50"] > 0
