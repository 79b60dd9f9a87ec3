"""The short table of training: the last rows, a model a line, what lacks an arm left out."""

from bench.command_tables import bench_table
from bench.model_tables import table

from .records import HEAD, row


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def made(*rows: dict) -> list[str]:
    return bench_table("train", [HEAD, *rows], render=table, short=True).splitlines()


def test_a_model_a_line():
    lines = made(
        row("1", "llama-2-7b", "full-autocast", 2.0, 100.0),
        row("1", "llama-2-7b", "hybrid-int8", 1.0, 1.0, tokens=2048),
        row("1", "64x2", "hybrid-int8", 3.0, 3.0),  # with nothing to compare it to
        row("1", "llama-2-7b", "hybrid-int8", 8.0, 25.0),
        row("1", "llama-2-7b", "hybrid-int8-head", 9.0, 25.0),
    )
    header, _, *models = [cells(line) for line in lines if line.startswith("|")]
    assert len(models) == 1
    found = dict(zip(header, models[0], strict=True))
    assert found["model"] == "llama-2-7b"
    assert (found["full, samples/s"], found["hybrid, int8 base, samples/s"]) == ("2", "8")
    assert (found["int8 base: speedup"], found["× all bf16"]) == ("4.00", "")
    assert found["with its head in int8"] == "4.50"
    assert (found["less memory"], found["than all bf16"]) == ("75%", "")
    assert (found["FLOPs"], found["device-seconds"]) == ("70%", "25%")
    assert f"commits `{'a' * 12}`" in lines[-1]
    assert not any("brackets" in line for line in lines)


def test_an_extrapolated_speedup_has_a_range_and_its_method():
    """Of 4,000 ms (3,200 to 4,000) over 1,000 (800 to 1,000); and over what may be nothing."""
    how = {"how": "extrapolated from 1 and 2 true-width layers, embeddings and head once"}
    rough = {"ms": {"p50": 1000.0, "p20": -100.0, "p80": 2000.0}}
    lines = made(
        row("1", "llama-2-7b", "full-autocast", 2.0, 100.0, **how),
        row("1", "llama-2-7b", "hybrid-int8", 8.0, 25.0, **how),
        row("1", "llama-2-7b", "hybrid-int8-head", 8.0, 25.0, **how, **rough),
        row("1", "64x2", "full-autocast", 2.0, 100.0),
        row("1", "64x2", "hybrid-int8", 8.0, 25.0),
    )
    header, _, *models = [cells(line) for line in lines if line.startswith("|")]
    found = {line[0]: dict(zip(header, line, strict=True)) for line in models}
    assert found["llama-2-7b"]["int8 base: speedup"] == "4.00 (3.2–5.0)"
    assert found["llama-2-7b"]["with its head in int8"] == "4.00 (1.6–∞)"
    assert found["64x2"]["int8 base: speedup"] == "4.00"
    assert [line for line in lines if line.startswith("- ")] == [f"- llama-2-7b: {how['how']}"]
    assert any(line.startswith("In brackets: the speedup") for line in lines)


def test_full_fine_tuning_counts_at_its_fastest():
    """By our loss it is faster here: all that is relative to it is relative to that."""
    both = {"speedup": {"full-autocast": 4.0, "full-autocast-lean": 3.2}}
    lines = made(
        row("1", "llama-2-7b", "full-autocast", 2.0, 100.0),
        row("1", "llama-2-7b", "full-autocast-lean", 2.5, 100.0),
        row("1", "llama-2-7b", "hybrid-int8", 8.0, 25.0, **both),
    )
    found = dict(zip(cells(lines[0]), cells(lines[2]), strict=True))
    assert (found["full, samples/s"], found["int8 base: speedup"]) == ("2.5", "3.20")
    assert found["device-seconds"] == "31%"
