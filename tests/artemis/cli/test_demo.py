"""The demo does the main job, measures it, and says what it measured."""

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from artemis.benchmark.memory import peak_memory
from artemis.cli import demo as command
from artemis.cli import main
from artemis.cli.demo.corpus import byte_pairs, help_topics, passages, python_sources
from artemis.cli.demo.recipe import QUICK, Workspace
from artemis.cli.demo.report import render, share_of_improvement
from artemis.errors import AdapterError


def test_the_demo_measures_every_arm(demo):
    assert demo.status == 0
    arms = json.loads(demo.json.read_text())["arms"]
    assert set(arms) == {"frozen", "full", "hybrid", "hybrid_int8", "reload"}
    assert arms["frozen"]["trainable_parameters"] == 0
    assert 0 < arms["hybrid"]["trainable_parameters"] < arms["full"]["trainable_parameters"]
    assert arms["hybrid_int8"]["trainable_parameters"] == arms["hybrid"]["trainable_parameters"]
    assert arms["hybrid_int8"]["new_loss"] == pytest.approx(arms["hybrid"]["new_loss"], rel=0.01)
    assert arms["hybrid_int8"]["new_loss"] != arms["hybrid"]["new_loss"]
    for arm in ("frozen", "full", "hybrid", "hybrid_int8"):
        assert arms[arm]["peak_memory_bytes"] > arms[arm]["training_memory_bytes"] > 0
        assert 0 < arms[arm]["new_loss"] < 2 * math.log(257)
    for arm in ("full", "hybrid", "hybrid_int8"):
        assert arms[arm]["tokens_per_second"] > 0
        assert arms[arm]["new_loss"] < arms["frozen"]["new_loss"]
    assert arms["reload"]["new_loss"] == pytest.approx(arms["hybrid"]["new_loss"], rel=1e-6)


def test_the_report_holds_the_table_and_the_text(demo):
    arms = json.loads(demo.json.read_text())["arms"]
    assert f"{arms['hybrid']['new_loss']:.4f}" in demo.output
    assert f"{arms['hybrid']['trainable_parameters']:,}" in demo.output
    assert arms["reload"]["prompt"] + "|" + arms["reload"]["generated"] in demo.output


def test_the_base_loads_with_transformers_and_stayed_as_it_was(demo):
    model = AutoModelForCausalLM.from_pretrained(demo.directory / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo.directory / "base")
    tokens = tokenizer("café\n", return_tensors="pt")
    assert tokens["input_ids"].shape == (1, 6)
    assert tokenizer.decode(tokens["input_ids"][0]) == "café\n"
    assert torch.isfinite(model(**tokens).logits).all()


def test_the_hybrid_saves_only_the_adapter(demo):
    saved = demo.directory / "hybrid"
    assert {path.name for path in saved.iterdir()} == {
        "hybrid_adapter.safetensors",
        "hybrid_adapter_config.json",
    }
    with safe_open(saved / "hybrid_adapter.safetensors", framework="pt") as file:
        assert all(name.startswith("hybrid_adapter.") for name in file.keys())  # noqa: SIM118


def test_the_base_is_used_again_while_its_recipe_is_the_same(demo):
    assert Workspace(demo.directory, QUICK).base_is_ready()
    other = Workspace(demo.directory, type(QUICK)())
    assert not other.base_is_ready()


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path, capsys):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "thesis.txt").write_text("years of work")
    assert main(["demo", "--quick", "--directory", str(tmp_path)]) == 1
    assert "no demo made it" in capsys.readouterr().err
    assert (tmp_path / "base" / "thesis.txt").read_text() == "years of work"


def test_a_loss_that_changed_by_loading_fails_the_demo():
    results = {
        "hybrid": {"new_loss": 1.0, "old_loss": 2.0},
        "reload": {"new_loss": 1.0, "old_loss": 2.001},
    }
    with pytest.raises(AdapterError, match="old_loss is 2.001 after loading"):
        command._check_reload(results)


@pytest.mark.parametrize("content", [b"too short", b"\xff\xfe"])
def test_an_unusable_text_fails_before_anything_is_trained(tmp_path, capsys, content):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    directory = tmp_path / "demo"
    assert main(["demo", "--quick", "--directory", str(directory), "--text", str(text)]) == 1
    assert str(text) in capsys.readouterr().err
    assert not directory.exists()


@pytest.mark.parametrize("file", ["absent/result.json", "."])
def test_a_result_that_cannot_be_written_fails_before_anything_is_trained(
    tmp_path, capsys, monkeypatch, file
):
    monkeypatch.setattr(command, "_run_stage", None)
    arguments = ["demo", "--quick", "--directory", str(tmp_path / "demo")]
    assert main([*arguments, "--json", str(tmp_path / file)]) == 1
    error = capsys.readouterr().err
    assert "--json: got" in error and "allowed: a file in a folder that exists" in error


def test_a_folder_of_the_demo_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_run_stage", None)
    (tmp_path / "file").touch()
    assert main(["demo", "--quick", "--directory", str(tmp_path / "file")]) == 1
    assert "--directory: got" in capsys.readouterr().err


def test_held_out_texts_were_not_trained_on():
    for train, held_out in (help_topics(), python_sources(500_000)):
        assert held_out
        assert set(train).isdisjoint(held_out)
    train, held_out = help_topics()
    paragraphs = {paragraph for text in train for paragraph in text.split("\n\n")}
    assert paragraphs.isdisjoint(text for passage in held_out for text in passage.split("\n\n"))


def test_passages_keep_the_text_and_drop_what_is_repeated():
    paragraphs = [f"{number} " + "x" * 500 for number in range(20)]
    text = "\n\n".join([*paragraphs, paragraphs[3]])
    assert "\n\n".join(passages(text)) == "\n\n".join(paragraphs)
    assert len(passages(text)) == 4  # 20 paragraphs of about 500 characters, 3,000 a passage


def test_every_byte_is_one_token():
    tokenizer = byte_pairs()
    text = "".join(map(chr, range(256))) + "\u20ac\U0001f642"
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text


def test_peak_memory_is_the_processes_own():
    """Not the parent's, which a process inherits in getrusage."""
    ballast = _touched(300_000_000)
    code = "from tests.artemis.cli.test_demo import _print_growth as p; p()"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(ballast) == 300_000_000
    assert 45e6 < int(child.stdout) < 80e6


def _print_growth() -> None:
    before = peak_memory()
    _touched(50_000_000)
    print(peak_memory() - before)


def _touched(size: int) -> bytearray:
    memory = bytearray(size)
    memory[::4096] = b"x" * len(memory[::4096])
    return memory


MEASURES = {
    "frozen": {"trainable_parameters": 0, "new_loss": 3.0, "old_loss": 1.0, "peak_memory_bytes": 1},
    "full": {"trainable_parameters": 1000, "new_loss": 1.0, "old_loss": 2.0},
    "hybrid": {"trainable_parameters": 10, "new_loss": 1.5, "old_loss": 1.25, "saved_bytes": 2e6},
    "hybrid_int8": {"trainable_parameters": 10, "new_loss": 1.75, "old_loss": 1.25},
}


def test_the_share_of_improvement():
    assert share_of_improvement(MEASURES) == 0.75
    assert share_of_improvement(MEASURES, "hybrid_int8") == 0.625
    worse = MEASURES | {"full": {"new_loss": 3.5, "old_loss": 1.0}}
    assert share_of_improvement(worse) is None


def test_the_table():
    lines = {line[:32].strip(): line[32:].split() for line in render(MEASURES).splitlines()}
    assert lines["trained parameters"] == ["0", "1,000", "10", "10"]
    assert lines["loss on the new text"] == ["3.0000", "1.0000", "1.5000", "1.7500"]
    assert lines["change"] == ["-", "-2.0000", "-1.5000", "-1.2500"]
    assert lines["change (above 0: forgotten)"] == ["-", "+1.0000", "+0.2500", "+0.2500"]
    assert lines["share of full's improvement"] == ["-", "100.0%", "75.0%", "62.5%"]
    assert lines["saved"] == ["-", "-", "2.0", "MB", "-"]
