"""The table of docs/tuning.md: the last entry of a case, on the machine it is of."""

from bench import tuned


def test_the_last_entry_of_a_case_stands_with_what_it_beat():
    head = {
        "kind": "tune", "run": "a", "table": "cpu-x", "time": "2026-01-02T00:00:00", "threads": 2,
        "processor": {"name": "x"}, "versions": {"torch": "2"}, "commit": "0" * 40, "dirty": False,
    }  # fmt: skip
    row = {
        "kind": "tuned", "run": "a", "part": "strategies", "usual": "plain",
        "key": "adapter_linear 1024 64 96 8 bfloat16 tensor training",
    }  # fmt: skip
    ms = {"plain": [1.9, 2.0, 2.1], "folded": [0.9, 1.0, 1.1]}
    first = row | {"chosen": "plain", "ms": {name: [1, 1, 1] for name in ms}}
    text = tuned.table([head, first, row | {"chosen": "folded", "ms": ms}])
    call = "`adapter_linear` 64→96, width 8, bfloat16, tensor, training"
    beaten = "plain | 2 (1.9–2.1) | folded | 1 (0.9–1.1) | 2.00 | kept"
    assert f"| {call} | 1,024 | {beaten} |" in text
    assert text.count(call) == 1 and "cpu-x, torch 2; commit `000000000000`, 2026-01-02." in text
    lost = row | {"chosen": "plain", "ms": ms | {"third": [0.8, 0.9, 2.9]}}
    unsure = "plain | 2 (1.9–2.1) | third | 0.9 (0.8–2.9) | 2.22 |  |"
    assert unsure in tuned.table([head, lost])
    assert tuned.table([]) == ""
