"""The short tables of training: the last rows, a model a line, what lacks an arm left out."""

from collections.abc import Callable

from bench.command_tables import bench_table
from bench.model_tables import baselines, models

from .records import HEAD, row

HOW = {"how": "extrapolated from 1 and 2 true-width layers, embeddings and head once"}


def made(render: Callable, *rows: dict) -> list[str]:
    return bench_table("train", [HEAD, *rows], render=render, short=True).splitlines()


def cells(lines: list[str]) -> dict[str, dict[str, str]]:
    """Model -> title -> cell."""
    header, _, *found = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    return {line[0]: dict(zip(header, line, strict=True)) for line in found}


def test_a_model_a_line():
    rows = (
        row("1", "llama-2-7b", "full-autocast", 2.0, 100.0),
        row("1", "llama-2-7b", "hybrid-int8", 1.0, 1.0, tokens=2048),
        row("1", "64x2", "hybrid-int8", 3.0, 3.0),  # with nothing to compare it to
        row("1", "llama-2-7b", "hybrid-int8", 8.0, 25.0),
        row("1", "llama-2-7b", "hybrid-int8-head", 9.0, 25.0),
        row("1", "llama-2-7b", "peft", 4.0, 50.0),
    )
    lines = made(models, *rows)
    assert cells(lines) == {
        "llama-2-7b": {
            "model": "llama-2-7b", "full fine-tuning": "2", "PEFT LoRA, all linear, bf16": "4",
            "hybrid, int8 base": "8", "int8 base: speedup": "4.00", "less memory": "75%",
        }
    }  # fmt: skip
    assert f"commits `{'a' * 12}`" in lines[-1]
    assert not any("brackets" in line for line in lines)
    assert cells(made(baselines, *rows)) == {
        "llama-2-7b": {
            "model": "llama-2-7b", "× full as transformers has it": "4.00", "× PEFT LoRA": "2.00",
            "with its head in int8": "4.50", "FLOPs": "70%", "device-seconds": "25%",
        }
    }  # fmt: skip


def test_an_extrapolated_speedup_has_a_range_and_its_method():
    """Of 4,000 ms (3,200 to 4,000) over 1,000 (800 to 1,000); and over what may be nothing."""
    rough = {"ms": {"p50": 1000.0, "p20": -100.0, "p80": 2000.0}}
    rows = (
        row("1", "llama-2-7b", "full-autocast", 2.0, 100.0, **HOW),
        row("1", "llama-2-7b", "hybrid-int8", 8.0, 25.0, **HOW),
        row("1", "llama-2-7b", "hybrid-int8-head", 8.0, 25.0, **HOW | rough),
        row("1", "llama-2-13b", "full-autocast", 2.0, 100.0, **HOW),
        row("1", "llama-2-13b", "hybrid-int8", 8.0, 25.0, **HOW),
        row("1", "64x2", "full-autocast", 2.0, 100.0),
        row("1", "64x2", "hybrid-int8", 8.0, 25.0),
    )
    lines = made(models, *rows)
    found = cells(lines)
    assert found["llama-2-7b"]["int8 base: speedup"] == "4.00 (3.2–5.0)"
    assert found["64x2"]["int8 base: speedup"] == "4.00"
    notes = [line for line in lines if line.startswith("- ")]
    assert notes == [f"- llama-2-7b, llama-2-13b: {HOW['how']}"]
    assert any(line.startswith("In brackets: the speedup") for line in lines)
    head = cells(made(baselines, *rows))["llama-2-7b"]["with its head in int8"]
    assert head == "4.00 (1.6–∞)"


def test_full_fine_tuning_counts_at_its_fastest():
    """By our loss it is faster here: all that is relative to it is relative to that."""
    both = {"speedup": {"full-autocast": 4.0, "full-autocast-lean": 3.2}}
    rows = (
        row("1", "llama-2-7b", "full-autocast", 2.0, 100.0),
        row("1", "llama-2-7b", "full-autocast-lean", 2.5, 100.0),
        row("1", "llama-2-7b", "hybrid-int8", 8.0, 25.0, **both),
    )
    found = cells(made(models, *rows))["llama-2-7b"]
    assert (found["full fine-tuning"], found["int8 base: speedup"]) == ("2.5", "3.20")
    assert cells(made(baselines, *rows))["llama-2-7b"]["device-seconds"] == "31%"


def test_each_way_counts_on_a_fused_model_where_that_is_faster():
    """The memory is then that of the fused one, and a head in int8 is compared with its like."""
    lean = {"speedup": {"full-autocast": 5.0, "full-autocast-lean-fused": 4.0}}
    rows = [
        row("1", "64x2", "full-autocast", 2.0, 100.0),
        row("1", "64x2", "full-autocast-lean-fused", 2.5, 80.0),
        row("1", "64x2", "peft", 4.0, 50.0),
        row("1", "64x2", "peft-fused", 3.9, 40.0),
        row("1", "64x2", "hybrid-int8", 8.0, 30.0),
        row("1", "64x2", "hybrid-int8-head", 9.0, 30.0),
        row("1", "64x2", "hybrid-int8-fused", 10.0, 20.0, **lean),
    ]
    short = cells(made(models, *rows))["64x2"]
    assert short == {
        "model": "64x2", "full fine-tuning": "2.5", "PEFT LoRA, all linear, bf16": "4",
        "hybrid, int8 base": "10", "int8 base: speedup": "4.00", "less memory": "80%",
    }  # fmt: skip
    against = cells(made(baselines, *rows))["64x2"]
    assert against["× full as transformers has it"] == "5.00"
    assert against["× PEFT LoRA"] == "2.50" and against["device-seconds"] == "25%"
    assert "with its head in int8" not in against
    rows.append(row("1", "64x2", "hybrid-int8-head-fused", 12.5, 20.0))
    assert cells(made(baselines, *rows))["64x2"]["with its head in int8"] == "5.00"


def test_what_ran_on_a_fused_model_alone_is_shown():
    rows = (
        row("1", "64x2", "full-autocast", 2.0, 100.0),
        row("1", "64x2", "hybrid-int8-fused", 8.0, 25.0),
        row("1", "32x2", "full-autocast", 2.0, 100.0),
    )
    found = cells(made(models, *rows))
    assert list(found) == ["64x2"] and found["64x2"]["int8 base: speedup"] == "4.00"


def test_compiled_rows_follow_the_others():
    rows = [
        row("1", "64x2", arm, samples, 100.0, **mode)
        for mode in ({"compiled": True}, {})
        for arm, samples in (("full-autocast", 2.0), ("hybrid-int8", 8.0))
    ]
    assert list(cells(made(models, *rows))) == ["64x2", "64x2, compiled"]


def test_in_short_the_machine_that_trained_last_comes_first():
    """Whatever the order of the records; of an older machine there is what the newer one lacks."""
    newer = HEAD | {"run": "2", "time": "2026-02-02T03:04:05"}
    newer |= {"processor": {"name": "newer", "flags": []}}
    rows = [
        row(run, model, arm, samples, 100.0)
        for run, model in (("1", "64x2"), ("1", "128x2"), ("2", "128x2"))
        for arm, samples in (("full-autocast", 2.0), ("hybrid-int8", 8.0))
    ]
    records = [newer, HEAD, *rows[::-1]]
    short = bench_table("train", records, render=models, short=True)
    assert short.count("128x2") == 1 and short.count("64x2") == 1
    assert short.index("On newer, ") < short.index("128x2") < short.index("On cpu, ")
    assert short.index("On cpu, ") < short.index("64x2")
    whole = bench_table("train", records, render=models)
    assert whole.count("128x2") == 2
    assert whole.index("On newer, ") < whole.index("128x2") < whole.index("On cpu, ")
