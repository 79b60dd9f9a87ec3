"""The comparison of attentions runs as its help says, and its tables show the last of each case."""

from artemis.benchmark.records import read
from bench import attention
from bench.step_tables import attention as table
from bench.step_tables import attention_of_a_prompt, attention_of_a_token


def test_a_run_ends_in_its_tables(tmp_path):
    out = tmp_path / "attention.jsonl"
    assert attention.main(["--rounds", "1", "--lengths", "16", "--out", str(out)]) == 0
    records = read(out)
    rows = [line for line in table(records).splitlines() if line.startswith(("| bf16", "| fp32"))]
    assert [line.split("|")[1:3] for line in rows] == [[" bf16 ", " 16 "], [" fp32 ", " 16 "]]
    prompts = attention_of_a_prompt(records).splitlines()
    assert [row.split("|")[1:3] for row in prompts[2:4]] == [[" bf16 ", " 16 "], [" fp32 ", " 16 "]]
    again = [record | {"ms": {"sdpa": {"p50": 7.125}, "eager": {"p50": 6.0}}} for record in records]
    rows = attention_of_a_token(records + again).splitlines()
    assert rows[2] == "| bf16 | 8 | 2 | 16 | 7.12 | 6.00 |  |"
    assert [row.split(" | ")[:3] for row in rows[2:6]] == [
        ["| bf16", "8", "2"], ["| bf16", "8", "8"], ["| fp32", "8", "2"], ["| fp32", "8", "8"]
    ]  # fmt: skip
