"""A session over workers that measure nothing: which jobs they get, and what becomes of each."""

from pathlib import Path

import pytest

from artemis.benchmark import budget
from artemis.benchmark.models import Cell
from artemis.benchmark.session import Session
from artemis.benchmark.steps import Step

CELL = Cell("64x2", 2, 96, 2, 16, whole=True)
FIRST, SECOND, THIRD = STEPS = [
    Step("train", arm, CELL) for arm in ("full-fp32", "full-bf16", "hybrid")
]
Job = tuple[list[str], list[str], int]  # arms, those that are checked, rounds


class Workers:
    """Stand in for the processes: each step takes 1 ms a round and passes the gate."""

    def __init__(self):
        self.jobs: list[Job] = []
        self.dies_in_company = False

    def __call__(self, job: dict):
        arms = [step["arm"] for step in job["steps"]]
        self.jobs.append((arms, [arms[number] for number in job["check"]], job["rounds"]))
        for number in range(len(arms)):
            gate = {"gate": {"passed": True}} if number in job["check"] else {}
            yield {"step": number, "trained_parameters": 1, **gate}
        for _ in range(job["rounds"]):
            for number in range(len(arms)):
                yield {"step": number, "ms": 1.0}
                if self.dies_in_company and len(arms) > 1:
                    yield {"killed": -9}
                    return


@pytest.fixture
def workers(monkeypatch) -> Workers:
    stand_ins = Workers()
    monkeypatch.setattr("artemis.benchmark.jobs.lines", stand_ins)
    monkeypatch.setattr("artemis.benchmark.session.measured_peaks", dict)
    return stand_ins


def available(monkeypatch, needed: float) -> None:
    """Just so much memory that what needs `needed` bytes fits into one process."""
    there = (needed + budget._RESERVE) / budget._SHARE + 1
    monkeypatch.setattr("artemis.benchmark.budget.available_memory", lambda: there)


def test_what_fits_takes_turns_in_one_process(workers, monkeypatch):
    available(monkeypatch, sum(step.estimated_bytes for step in STEPS))
    Session().time(STEPS, [], rounds=4)
    assert workers.jobs == [(["full-fp32", "full-bf16", "hybrid"], [], 4)]


def test_what_does_not_fit_now_alternates_however_large_the_machine_is(workers, monkeypatch):
    available(monkeypatch, FIRST.estimated_bytes + SECOND.estimated_bytes)
    session = Session()
    session.time(STEPS, [], rounds=4)
    block = [(["full-fp32", "full-bf16"], [], 2), (["hybrid"], [], 2)]
    assert workers.jobs == block * 2
    assert session.failed(THIRD) is None and session.spread(THIRD).p50 == 1.0


def test_the_gates_reference_needs_memory_too(workers, monkeypatch):
    available(monkeypatch, sum(step.estimated_bytes for step in STEPS))
    Session().time(STEPS, [THIRD], rounds=4)
    assert workers.jobs == [  # once it has passed the gate, all fit
        (["full-fp32", "full-bf16"], [], 2),
        (["hybrid"], ["hybrid"], 2),
        (["full-fp32", "full-bf16", "hybrid"], [], 2),
    ]
    assert THIRD.reference_bytes >= 4 * CELL.architecture.parameters  # held in fp32


def test_what_never_fits_is_said_and_left_out(workers, monkeypatch, capsys):
    there = budget._RESERVE + SECOND.estimated_bytes
    monkeypatch.setattr("artemis.benchmark.budget.available_memory", lambda: there)
    session = Session()
    session.time([FIRST, SECOND], [], rounds=2)
    assert workers.jobs == [(["full-bf16"], [], 2)] and session.spread(FIRST) is None
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("not measured: train by full-fp32") and "are available" in said


def test_a_killed_process_costs_what_it_had_not_finished(workers, monkeypatch, tmp_path):
    """One by one the rest are measured after all; what was timed stays."""
    available(monkeypatch, sum(step.estimated_bytes for step in STEPS) + THIRD.reference_bytes)
    workers.dies_in_company = True
    session = Session()
    session.time(STEPS, [THIRD], rounds=1)
    assert workers.jobs == [
        (["full-fp32", "full-bf16", "hybrid"], ["hybrid"], 1),
        (["full-bf16"], [], 1),
        (["hybrid"], ["hybrid"], 1),
    ]
    assert [session.failed(step) for step in STEPS] == [None] * 3
    assert [session.spread(step).p50 for step in STEPS] == [1.0] * 3
    assert session.value(THIRD, "gate") == {"passed": True}


def test_what_kills_a_process_of_its_own_fails(workers, monkeypatch, capsys):
    monkeypatch.setattr("artemis.benchmark.jobs.lines", lambda job: iter([{"killed": -9}]))
    session = Session()
    session.time([FIRST], [], rounds=2)
    session.measure_memory([Step("memory", "hybrid", CELL)])
    failures = {record["arm"]: record["failed"] for record in session.records}
    assert failures == dict.fromkeys(("full-fp32", "hybrid"), "its process ended by signal 9")
    assert len(capsys.readouterr().err.splitlines()) == 2


# --- a file of earlier results


@pytest.fixture
def source(monkeypatch) -> dict:
    """What runs say of their source; a test changes it."""
    said = {"commit": "a" * 40, "dirty": False}
    monkeypatch.setattr("artemis.benchmark.machine.source", lambda: dict(said))
    return said


@pytest.fixture
def versions(monkeypatch) -> dict:
    """And of packages."""
    said = {"torch": "2.13.0", "artemis": "1.0"}
    monkeypatch.setattr("artemis.benchmark.machine.versions", lambda: dict(said))
    return said


@pytest.fixture
def earlier(tmp_path, workers, source, versions) -> Path:
    """The file of a run that timed all steps, and found the last inaccurate."""
    path = tmp_path / "earlier.jsonl"
    session = Session(path)
    session.time([FIRST, SECOND], [SECOND], rounds=2)
    failed = {"gate": {"passed": False}, "failed": "fails the accuracy rule"}
    session.save({"kind": "step", **THIRD.to_dict(), **failed})
    session.save({"kind": "row", "table": "train", "arm": "hybrid"})
    session.save({"kind": "row", "table": "kernels", "op": "lora_linear", "ms": {"p50": 1.0}})
    workers.jobs.clear()
    return path


def resumed(path: Path) -> Session:
    session = Session(path, resume=True)
    session.time(STEPS, [SECOND, THIRD], rounds=2)
    return session


def test_results_of_the_same_code_count(earlier, workers, recwarn):
    session = resumed(earlier)
    assert workers.jobs == [] and not recwarn
    assert session.failed(THIRD) == "fails the accuracy rule"
    assert [r["op"] for r in session.records if r["kind"] == "row"] == ["lora_linear"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"commit": "b" * 40}, "another commit"),
        ({"dirty": True}, "uncommitted changes"),
        ({"transformers": "6.0"}, "other versions of packages"),
        ({"artemis": "1.1"}, "other versions of packages"),
    ],
)
def test_results_of_other_code_are_measured_anew(
    earlier, workers, source, versions, change, reason
):
    """Gates and failures too; and no time is mixed with theirs."""
    source |= {name: value for name, value in change.items() if name in source}
    versions |= {name: value for name, value in change.items() if name not in source}
    with pytest.warns(UserWarning) as warned:
        session = resumed(earlier)
    (warning,) = warned
    said = f"--resume: {earlier}: results left out: 4 ({reason})"
    assert str(warning.message) == said
    assert workers.jobs == [([step.arm for step in STEPS], ["full-bf16", "hybrid"], 2)]
    assert session.failed(THIRD) is None and session.spread(THIRD).p50 == 1.0
    assert {record["run"] for record in session.records} == {session.run}


def test_results_with_uncommitted_changes_never_count_again(earlier, workers, source, recwarn):
    source["dirty"] = True
    resumed(earlier)
    source["dirty"] = False
    workers.jobs.clear()
    session = resumed(earlier)  # takes those of the first run
    assert workers.jobs == [] and len(recwarn) == 2
    assert "left out: 3 (uncommitted changes)" in str(recwarn[1].message)
    assert session._rounds(FIRST) == 2


def test_accuracies_count_whatever_the_code_and_the_allocator(earlier, source, monkeypatch):
    session = Session(earlier, resume=True)
    session.save({"kind": "quality", "accuracy": 0.5})
    text = earlier.read_text()
    earlier.write_text(text.replace('"allocator":', '"of old":'))
    source["commit"] = "b" * 40
    with pytest.warns(UserWarning) as warned:
        found = Session(earlier, resume=True).records
    assert [str(warning.message).partition(": results ")[2] for warning in warned] == [
        "left out: 4 (another commit)",
        "of other code that count: 1 (another commit)",
    ]
    assert [record["kind"] for record in found] == ["quality"]
