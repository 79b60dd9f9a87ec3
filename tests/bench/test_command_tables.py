"""Tables of what `artemis bench` wrote: which runs are shown, and that their figures agree."""

import json
import re

import pytest

from artemis.benchmark.tables import COLUMNS
from bench import report
from bench.command_tables import bench_table
from bench.kernel_tables import table as kernel_table

MACHINE = {
    "kind": "run", "processor": {"name": "cpu", "flags": []}, "threads": 2, "dirty": False,
    "versions": {"torch": "2.13.0"}, "gpu": None, "time": "2026-01-02T03:04:05", "commit": "a" * 40,
}  # fmt: skip
KEPT = {"allocator": "keeps freed memory"}


def memory_run(run: str, head: dict, tokens: int = 1024, **peaks: float) -> list[dict]:
    """A run that measured the peaks of some arms, in GB, and their ratios."""
    about = {
        "kind": "row", "table": "memory", "run": run, "model": "llama-2-7b", "tokens": tokens,
        "sequence": 128, "batch": 8, "how": "measured whole",
    }  # fmt: skip
    arms = {name.replace("_", "-"): peak for name, peak in peaks.items()}
    rows = [
        {
            **about, "arm": arm, "what": arm,
            "memory": {"states": 0, "activations": 0, "peak": peak * 1e9},
            "peak_of": {other: round(peak / arms[other], 4) for other in arms},
        }
        for arm, peak in arms.items()
    ]  # fmt: skip
    return [{"run": run, **MACHINE, **head}, *rows]


def shown(made: str) -> list[dict[str, str]]:
    """The cells of every line of the tables, by their titles, and what the table's heading says."""
    found, header, about = [], None, {}
    for line in made.splitlines():
        if line.startswith("**"):
            batch = re.search(r"\((.*)\)", line)[1]
            about = dict(each.split(": ") for each in batch.split("; "))
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in line[1:-1].split("|")]
        if header is None:
            header = cells
        elif cells[0] != "---":
            found.append(about | dict(zip(header, cells, strict=True)))
    return found


def test_every_ratio_shown_is_one_of_figures_shown():
    """An arm that the last run left out had its ratios to the arms of another run."""
    records = [
        *memory_run("1", KEPT, full_fp32=109.0, full_autocast=111.2, full_bf16=64.0, hybrid=30.0),
        *memory_run("1b", KEPT, tokens=2048, full_autocast=120.0, hybrid=20.0),
        *memory_run("2", KEPT, full_autocast=116.0, full_bf16=65.0, hybrid=31.0),
    ]
    lines = shown(bench_table("memory", records))
    assert [(line["arm"], line["tokens a step"]) for line in lines] == [
        ("full-autocast", "1,024"), ("full-bf16", "1,024"), ("hybrid", "1,024"),
        ("full-autocast", "2,048"), ("hybrid", "2,048"),
    ]  # fmt: skip
    peaks = {(line["arm"], line["tokens a step"]): float(line["peak, GB"]) for line in lines}
    columns = {"of full bf16 autocast": "full-autocast", "of full bf16": "full-bf16"}
    ratios = 0
    for line in lines:
        for column, arm in columns.items():
            if line[column]:
                quotient = float(line["peak, GB"]) / peaks[arm, line["tokens a step"]]
                assert float(line[column].rstrip("%")) == pytest.approx(100 * quotient, abs=0.51)
                ratios += 1
    assert ratios == 3 * 2 + 2


def test_of_an_operation_only_the_last_run_is_shown():
    def row(run: str, provider: str, ms: float) -> dict:
        return {
            "kind": "row", "table": "kernels", "run": run, "op": "lora", "layer": "q", "m": 1,
            "k": 64, "n": 64, "r": 8, "dropout": 0.0, "pass": "forward", "dtype": "bfloat16",
            "provider": provider, "ms": {"p50": ms}, "over_floor": 1.0, "over_best_peer": 0.5,
        }  # fmt: skip

    heads = [{"run": run, **MACHINE, **KEPT} for run in ("1", "2")]
    rows = [row("1", "artemis", 7.0), row("1", "peft", 14.0), row("2", "artemis", 3.0)]
    (line,) = shown(bench_table("kernels", [*heads, *rows], render=kernel_table))
    assert line["Artemis"] == "3" and "PEFT" not in line


def test_layers_at_inference_have_a_table_of_their_own():
    def row(provider: str, ms: float, which: str) -> dict:
        return {
            "kind": "row", "table": "kernels", "run": "1", "op": "lora", "layer": "q", "m": 1,
            "k": 64, "n": 64, "r": 8, "dropout": 0.0, "pass": which, "dtype": "bfloat16",
            "provider": provider, "ms": {"p50": ms}, "over_floor": 2.0, "over_best_peer": ms / 8,
        }  # fmt: skip

    rows = [
        row("artemis", 9.0, "forward"), row("artemis, frozen", 4.0, "forward"),
        row("artemis, int8, frozen", 2.0, "forward"), row("plain", 8.0, "forward"),
        row("artemis", 16.0, "both"), row("plain", 8.0, "both"),
    ]  # fmt: skip
    training, inference = kernel_table(rows).split("\n\nLayers")
    (trained,), (inferred,) = shown(training), shown(inference)
    assert [trained[t] for t in ("Artemis", "× best peer", "floor, ms")] == ["16", "0.50", "8"]
    shows = ("Artemis", "int8", "constants anew", "× best peer", "int8: × best peer", "floor, ms")
    assert [inferred[title] for title in shows] == ["4", "2", "9", "2.00", "4.00", "2"]


@pytest.mark.parametrize(
    ("other", "hidden"),
    [
        ({}, True),
        ({"allocator": "as it comes"}, True),
        ({"gpu": {"name": "H100"}}, False),
        ({"processor": {"name": "another", "flags": []}}, False),
        ({"threads": 1}, False),
    ],
)
def test_freed_memory_kept_hides_only_the_same_machine_without(other, hidden):
    records = [
        *memory_run("plain", other, full_autocast=9.0, hybrid=7.0),
        *memory_run("kept", KEPT, full_autocast=9.0, hybrid=5.0),
        *memory_run("more", other, tokens=2048, full_autocast=9.0, hybrid=6.0),  # not yet kept
    ]
    lines = shown(bench_table("memory", records))
    found = [line["peak, GB"] for line in lines if line["arm"] == "hybrid"]
    assert found == (["5.00", "6.00"] if hidden else ["5.00", "7.00", "6.00"])


def test_the_tables_leave_out_a_line_that_was_cut_short(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    text = "".join(
        json.dumps(record) + "\n" for record in memory_run("1", KEPT, full_bf16=2.0, hybrid=1.0)
    )
    (tmp_path / "memory.jsonl").write_text(text[:-40])
    document = tmp_path / "page.md"
    document.write_text("<!-- begin: bench-memory -->\n<!-- end: bench-memory -->\n")
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0 == report.main(["--check"])
    assert [line["arm"] for line in shown(document.read_text())] == ["full-bf16"]


@pytest.mark.parametrize(
    ("table", "figures", "shown"),
    [
        ("train", {"speedup": {"full-autocast": 1, "full-fp32": 2, "full-bf16": 3}},
         {"× full bf16 autocast": "1.00", "× full fp32": "2.00", "× full bf16": "3.00"}),
        ("memory", {"peak_of": {"full-autocast": 1, "full-bf16": 2, "full-bf16-checkpointed": 3}},
         {"of full bf16 autocast": "100%", "of full bf16": "200%", "of it checkpointed": "300%"}),
        ("decode", {"prefill": {"speedup": {"full-bf16": 1, "full-fp32": 2}}},
         {"× plain bf16": "1.00", "× plain fp32": "2.00"}),
        ("decode", {"decode": {"speedup": {"full-bf16": 3, "full-fp32": 4}}},
         {"× plain bf16": "3.00", "× plain fp32": "4.00"}),
    ],
)  # fmt: skip
def test_a_ratio_stands_under_the_arm_that_it_is_to(table, figures, shown):
    row = {"model": "64x2", "what": "hybrid", "ms": {"p20": 1, "p50": 2, "p80": 3}} | figures
    cells = {column.title: cell for column in COLUMNS[table] if (cell := column.cell(row))}
    assert {title: cells[title] for title in shown} == shown
