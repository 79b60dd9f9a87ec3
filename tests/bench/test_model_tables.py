"""The short table of training: the last rows, a model a line, what lacks an arm left out."""

from bench.model_tables import table
from bench.report import bench_table

MACHINE = {
    "processor": {"name": "cpu", "flags": []}, "threads": 2, "cores": 2, "memory_gb": 8.0,
    "versions": {"torch": "2.13.0"}, "gpu": None, "dirty": False, "time": "2026-01-02T03:04:05",
}  # fmt: skip


def row(run: str, model: str, arm: str, samples: float, peak: float, **more) -> dict:
    return {
        "kind": "row", "table": "train", "run": run, "model": model, "arm": arm, "tokens": 1024,
        "ms": {"p50": 1.0}, "samples_per_second": samples, "memory": {"peak": peak},
        "speedup": {"full-autocast": samples / 2.0}, "flops_relative": 0.7,
        "device_seconds_relative": 2.0 / samples, **more,
    }  # fmt: skip


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_what_an_allocator_that_keeps_memory_supersedes_is_not_shown():
    kept = {"allocator": "keeps freed memory"}
    records = [
        {"kind": "run", "run": "plain", "commit": "a" * 40, **MACHINE},
        {"kind": "run", "run": "kept", "commit": "b" * 40, **MACHINE, **kept},
        *(row(run, "64x2", "full-autocast", 2.0, 9.0) for run in ("kept", "plain")),
        row("kept", "64x2", "hybrid-int8", 5.0, 9.0),
        row("plain", "64x2", "hybrid-int8", 6.0, 9.0),
        row("plain", "llama-2-7b", "full-autocast", 2.0, 9.0),
        row("plain", "llama-2-7b", "hybrid-int8", 7.0, 9.0),
    ]
    made = bench_table("train", records, render=table, short=True)
    lines = [cells(line) for line in made.splitlines() if line.startswith("| ")]
    found = [(line[0], line[3]) for line in lines if line[0] not in ("model", "---")]
    assert sorted(found) == [("64x2", "5"), ("llama-2-7b", "7")]


def test_a_model_a_line_of_its_last_rows():
    records = [
        {"kind": "run", "run": "old", "commit": "a" * 40, **MACHINE},
        row("old", "llama-2-7b", "full-autocast", 2.0, 100.0),
        row("old", "llama-2-7b", "hybrid-int8", 4.0, 90.0),
        row("old", "llama-2-7b", "hybrid-int8", 1.0, 1.0, tokens=2048),
        row("old", "64x2", "hybrid-int8", 3.0, 3.0),  # with nothing to compare it to
        {"kind": "run", "run": "new", "commit": "b" * 40, **MACHINE},
        row("new", "llama-2-7b", "hybrid-int8", 8.0, 25.0),
        row("new", "llama-2-7b", "hybrid-int8-head", 9.0, 25.0),
    ]
    made = bench_table("train", records, render=table, short=True)
    header, _, *lines = [cells(line) for line in made.splitlines() if line.startswith("|")]
    assert len(lines) == 1
    found = dict(zip(header, lines[0], strict=True))
    assert found["model"] == "llama-2-7b"
    assert (found["full, samples/s"], found["hybrid, int8 base, samples/s"]) == ("2", "8")
    assert (found["int8 base: speedup"], found["× all bf16"]) == ("4.00", "")
    assert found["with its head in int8"] == "4.50"
    assert (found["less memory"], found["than all bf16"]) == ("75%", "")
    assert (found["FLOPs"], found["device-seconds"]) == ("70%", "25%")
    assert f"commits `{'a' * 12}`, `{'b' * 12}`" in made
