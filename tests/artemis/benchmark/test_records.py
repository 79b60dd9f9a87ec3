"""Files of JSON lines: what a full disk or a killed process leaves can be read and added to."""

import json
import shutil
import subprocess

import pytest

from artemis.benchmark import machine
from artemis.benchmark.records import append, read

RECORDS = [{"kind": "run", "run": "1"}, {"kind": "step", "ms": [1.0, 2.0]}]


@pytest.mark.parametrize("missing", [1, 2, 20, 36])
def test_a_line_that_was_cut_short_costs_only_itself(tmp_path, missing):
    """A missing end of a line costs nothing."""
    path = tmp_path / "cut" / "results.jsonl"
    append(path, RECORDS)
    whole = path.read_text()
    path.write_text(whole[:-missing])
    kept = RECORDS if missing == 1 else RECORDS[:1]
    assert read(path) == kept
    append(path, [{"kind": "later"}])
    assert read(path) == [*kept, {"kind": "later"}]
    assert path.read_text().endswith(f"\n{json.dumps({'kind': 'later'})}\n")


def test_adding_nothing_makes_a_file_and_changes_none(tmp_path):
    path = tmp_path / "results.jsonl"
    append(path, [])
    assert path.read_text() == "" and read(path) == []
    append(path, RECORDS)
    before = path.read_text()
    append(path, [])
    assert path.read_text() == before


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_only_changed_code_differs_from_its_commit(tmp_path, monkeypatch):
    """Results that were written beside it do not, nor do documents."""

    def git(*arguments: str) -> None:
        named = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", tmp_path, *named, *arguments], check=True, capture_output=True)

    package = tmp_path / "artemis"
    (package / "benchmark").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(machine, "__file__", str(package / "benchmark" / "machine.py"))
    code = machine.code_hash(tmp_path)
    # As an installed package: whether it was changed is not known.
    assert machine.source() == {"commit": None, "dirty": None, "code": code}
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a")
    (package / "benchmark" / "machine.py").write_text("")
    git("add", ".")
    git("commit", "-qm", "b")
    for other in ("train.jsonl", "bench/results/cpu.jsonl", "docs/page.md"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_text("{}\n")
    assert not machine.source()["dirty"] and len(machine.source()["commit"]) == 40
    (tmp_path / "bench" / "new.py").write_text("")
    assert machine.source()["dirty"]
    (tmp_path / "bench" / "new.py").unlink()
    before = machine.source()["code"]
    (package / "__init__.py").write_text("changed = True\n")
    assert machine.source()["dirty"]
    assert machine.source()["code"] not in (before, code) and len(before) == 12


def test_a_hash_of_code_is_of_names_and_contents_of_code_alone(tmp_path):
    kernel = tmp_path / "artemis_kernels" / "core" / "native" / "a.c"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("int a;")
    seen = [machine.code_hash(tmp_path)]
    for other in ("artemis/a.pyc", "bench/results/a.jsonl", "tests/a.py", "docs/a.md"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_text("x")
    assert machine.code_hash(tmp_path) == seen[0]
    kernel.write_text("int b;")
    seen.append(machine.code_hash(tmp_path))
    kernel.rename(kernel.with_name("b.c"))
    seen.append(machine.code_hash(tmp_path))
    assert len(set(seen)) == 3


def test_processors_of_two_generations_are_told_apart(tmp_path, monkeypatch):
    """A virtual machine may call both the same; some processors tell no generation."""
    information, names = tmp_path / "cpuinfo", []
    monkeypatch.setattr(machine, "Path", lambda path: information)
    numbers = ("cpu family\t: 25\nmodel\t\t: 17\n", "cpu family\t: 26\nmodel\t\t: 2\n", "")
    for text in numbers:
        information.write_text(f"{text}model name\t: Some Server\nflags\t\t: fpu avx2\n")
        names.append(machine.processor())
    assert names == [
        {"name": f"Some Server{generation}", "flags": ["avx2"]}
        for generation in (", family 25 model 17", ", family 26 model 2", "")
    ]
