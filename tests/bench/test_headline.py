"""The README's picture shows what the results say, and its numbers can be read back."""

import json
import xml.etree.ElementTree as xml

from artemis.benchmark.records import read
from bench import ROOT
from bench.command_tables import rows_here
from bench.headline import Bar, bars, description, draw

from .records import row

DESCRIPTION = ".//{http://purl.org/dc/elements/1.1/}description"


def described(path) -> list:
    return json.loads(xml.parse(path).find(DESCRIPTION).text)


def test_bars_are_relative_to_full_fine_tuning_at_its_fastest():
    """By our loss full fine-tuning is faster; memory is beside the arm that people run."""
    lean = {"speedup": {"full-autocast": 4.0, "full-autocast-lean": 3.2}}
    found = bars(
        [
            row("1", "llama-2-7b", "hybrid-int8", 8.0, 25.0, **lean),
            row("1", "64x2", "full-autocast", 2.0, 100.0),
            row("1", "64x2", "hybrid", 4.0, 50.0, compiled=True),
            row("1", "64x2", "peft", 3.0, 50.0, tokens=2048),
            row("1", "64x2", "hybrid", 5.0, 60.0),
            row("1", "64x2", "full-fp32", 1.0, 200.0),
            row("1", "llama-2-7b", "full-autocast-lean", 2.5, 90.0),
            row("1", "llama-2-7b", "full-autocast", 2.0, 100.0),
        ]
    )
    assert set(found) == {
        Bar("llama-2-7b", "hybrid-int8", 3.2, 3.2, 3.2, 0.25),
        Bar("64x2", "hybrid", 2.5, 2.5, 2.5, 0.6),
    }


def test_a_bar_of_what_ran_on_a_fused_model_alone():
    full = row("1", "64x2", "full-autocast", 2.0, 100.0)
    assert bars([full, row("1", "64x2", "hybrid-fused", 5.0, 60.0)]) == [
        Bar("64x2", "hybrid", 2.5, 2.5, 2.5, 0.6)
    ]


def test_what_is_extrapolated_has_a_whisker_unless_it_has_no_end(tmp_path):
    how = {"how": "extrapolated from 1 and 2 true-width layers"}
    full = row("1", "llama-2-7b", "full-autocast", 2.0, 100.0, **how)  # 3,200 to 4,000 ms
    sure = row("1", "llama-2-7b", "hybrid", 4.0, 25.0, **how)  # 1,600 to 2,000 ms
    rough = row("1", "llama-2-7b", "hybrid-int8", 8.0, 25.0, **how)
    rough["ms"]["p20"] = -100.0
    hybrid, packed = bars([full, sure, rough])
    assert (hybrid.low, hybrid.speed, hybrid.high) == (1.6, 2.0, 2.5)
    assert (packed.low, packed.high) == (3.2, float("inf"))
    draw([hybrid, packed], tmp_path / "drawn.svg")
    assert described(tmp_path / "drawn.svg") == json.loads(description([hybrid, packed]))


def test_the_committed_picture_is_not_behind_its_results():
    rows = rows_here("train", read(ROOT / "bench/results/cpu_bench_train.jsonl"))
    picture = ROOT / "docs/pictures/training.svg"
    assert described(picture) == json.loads(description(bars(rows))), "python -m bench.pictures"
