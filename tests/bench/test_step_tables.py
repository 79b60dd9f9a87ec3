"""Tables of training steps: each machine's apart, the one that ran last first."""

from bench import step_tables

CASE = {"hidden": 512, "layers": 8, "batch": 8, "sequence": 128, "tokens": 1024}


def run(name: str, processor: str, ratio: float) -> list[dict]:
    head = {
        "kind": "run", "run": name, "processor": {"name": processor, "flags": []}, "threads": 2,
        "case": CASE,
    }  # fmt: skip
    spread = {"p20": ratio, "p50": ratio, "p80": ratio}
    of_run = {"run": name, "kind": "ratio", "name": "bf16: ours", "target": "", "met": None}
    return [head, of_run | spread]


def test_machines_stand_apart_and_the_last_comes_first():
    records = run("a", "Old", 1.125) + run("b", "New", 1.25) + run("c", "Old", 1.5)
    table = step_tables.training_step_ratios(records)
    assert table.index("On Old:") < table.index("1.500") < table.index("On New:")
    assert table.index("On New:") < table.index("1.250") and "1.125" not in table


def test_one_machine_is_not_named():
    assert "On " not in step_tables.training_step_ratios(run("a", "Old", 1.125))
