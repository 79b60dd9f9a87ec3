"""artemis train: what it refuses before it loads anything, resumed runs, several processes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from artemis import read_adapter
from artemis.cli import main
from artemis.training import load_base
from artemis.training import run as run_module

from .files import training_file

ADAPTER = "hybrid_adapter.safetensors"


def change(path: Path, **sections) -> Path:
    """Set keys of sections of a training file; None takes a section out."""
    values = yaml.safe_load(path.read_text())
    for name, changes in sections.items():
        if changes is None:
            del values[name]
        elif isinstance(changes, dict):
            values[name] = values.get(name, {}) | changes
        else:
            values[name] = changes
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def nothing_loaded(monkeypatch):
    """The model must not be read."""

    def refuse(*arguments):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(run_module, "load_base", refuse)


def fails_in_one_line(path: Path, capsys, *flags: str) -> str:
    """What `artemis train` says when it refuses a file."""
    capsys.readouterr()  # what came before
    assert main(["train", str(path), *flags]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def with_base(workspace, folder: Path) -> Path:
    return Path(shutil.copytree(workspace.base, folder))


def test_a_tokenizer_without_padding(workspace, tmp_path):
    base = with_base(workspace, tmp_path / "base")
    _, tokenizer = load_base(str(base), torch.float32)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    assert load_base(str(base), torch.float32)[1].pad_token is None
    path = change(training_file(workspace, tmp_path), model=str(base))
    assert main(["train", str(path)]) == 0
    assert read_adapter(tmp_path / "out").parameters > 0


# --- the folder


def test_a_new_run_leaves_the_checkpoints_of_an_old_one(workspace, tmp_path, capsys, monkeypatch):
    path = training_file(workspace, tmp_path, max_steps=2, save_steps=1)
    assert main(["train", str(path)]) == 0
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "load_base", None)
        error = fails_in_one_line(path, capsys)
    assert f"training.output_dir: got '{tmp_path / 'out'}'" in error
    assert "checkpoint-1, checkpoint-2 of an earlier run, allowed: --resume" in error
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert main(["train", str(path), "--resume"]) == 0
    assert "2 steps, all done before\n" in capsys.readouterr().out
    assert main(["train", str(path), "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train_loss"] is None


def test_a_resumed_run_may_outlive_its_checkpoint(workspace, tmp_path, capsys):
    path = training_file(workspace, tmp_path, max_steps=2, save_steps=1)
    assert main(["train", str(path)]) == 0
    capsys.readouterr()
    change(path, training={"max_steps": 5})
    assert main(["train", str(path), "--resume", "--json"]) == 0
    assert {file.name for file in (tmp_path / "out").glob("checkpoint-*")} == {
        "checkpoint-4",
        "checkpoint-5",
    }
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 5 and result["eval_loss"] > 0 and result["train_loss"] > 0


def test_another_kind_of_run_is_not_resumed(workspace, tmp_path, capsys, monkeypatch):
    path = training_file(workspace, tmp_path, max_steps=1, save_steps=1)
    assert main(["train", str(path)]) == 0
    adapter = yaml.safe_load(path.read_text())["hybrid_adapter"]
    change(path, hybrid_adapter=None, training={"learning_rate": 1e-4})
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "load_base", None)
        for absent in (None, {"enabled": False}):
            if absent:
                change(path, hybrid_adapter=adapter | absent)
            error = fails_in_one_line(path, capsys, "--resume")
            assert "hybrid_adapter: absent or not enabled, and" in error
            assert "checkpoint-1 is of an adapter" in error
    shutil.rmtree(tmp_path / "out")
    assert main(["train", str(path)]) == 0
    change(path, hybrid_adapter=adapter | {"enabled": True})
    monkeypatch.setattr(run_module, "load_base", None)
    assert "to resume a run of an adapter" in fails_in_one_line(path, capsys, "--resume")


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"logging_steps": 1}, "the loss at step 3 is nan: "), ({}, "the mean loss is nan: ")],
    ids=["reported", "at the end"],
)
def test_a_run_that_diverged_leaves_the_earlier_result(workspace, tmp_path, capsys, changes, words):
    path = training_file(workspace, tmp_path)
    assert main(["train", str(path)]) == 0
    before = (tmp_path / "out" / ADAPTER).read_bytes()
    capsys.readouterr()
    change(path, training={"learning_rate": 1e30} | changes)
    assert main(["train", str(path), "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith(f"artemis train: {words}")
    assert (tmp_path / "out" / ADAPTER).read_bytes() == before


def test_a_last_step_that_diverged_shows_in_the_held_out_loss(workspace, tmp_path, capsys):
    path = training_file(workspace, tmp_path, max_steps=2, learning_rate=1e30)
    assert main(["train", str(path), "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "artemis train: the held-out loss is nan: training has diverged" in captured.err


def test_a_run_without_checkpoints_may_be_repeated(workspace, tmp_path):
    path = training_file(workspace, tmp_path, max_steps=2)
    assert main(["train", str(path)]) == 0
    assert main(["train", str(path)]) == 0


@pytest.mark.usefixtures("nothing_loaded")
def test_nothing_to_resume_is_said_before_the_model_is_loaded(workspace, tmp_path, capsys):
    error = fails_in_one_line(training_file(workspace, tmp_path), capsys, "--resume")
    assert "no complete checkpoint under" in error


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize("place", ["file", "file/below", "/proc"])
def test_a_folder_that_cannot_be_written(workspace, tmp_path, capsys, place):
    if place == "/proc" and not Path(place).is_dir():
        pytest.skip("no folder here that nobody can write to")
    (tmp_path / "file").touch()
    folder = tmp_path / place
    error = fails_in_one_line(training_file(workspace, tmp_path, output_dir=str(folder)), capsys)
    assert f"training.output_dir: got '{folder}', allowed: a folder that can be written" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there are graphs")
@pytest.mark.usefixtures("nothing_loaded")
def test_graphs_without_a_gpu(workspace, tmp_path, capsys):
    error = fails_in_one_line(training_file(workspace, tmp_path, cuda_graphs=True), capsys)
    assert "cuda_graphs: got True on the device cpu, allowed:" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there are graphs")
def test_the_trainer_is_told_of_graphs(workspace, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_module, "check_arguments", lambda arguments: None)
    error = fails_in_one_line(training_file(workspace, tmp_path, cuda_graphs=True), capsys)
    assert "cuda_graphs: got True on the device cpu" in error


def test_the_test_of_a_folder_leaves_nothing_there(workspace, tmp_path, capsys):
    path = change(training_file(workspace, tmp_path), model=str(tmp_path / "absent"))
    assert "cannot load the model" in fails_in_one_line(path, capsys)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.usefixtures("nothing_loaded")
def test_a_base_is_not_overwritten(workspace, tmp_path, capsys, monkeypatch):
    base = with_base(workspace, tmp_path / "base")
    (tmp_path / "link").symlink_to(base)
    for name in ("base", "link", "elsewhere/../base"):
        path = training_file(workspace, tmp_path, output_dir=str(tmp_path / name))
        error = fails_in_one_line(change(path, model=str(base), hybrid_adapter=None), capsys)
        assert "training.output_dir: got" in error and "the model that is trained" in error
    monkeypatch.chdir(tmp_path)
    for changes in (dict(hybrid_adapter=None), {}):  # a folder of that name would hide the model
        path = training_file(workspace, tmp_path, output_dir="gpt2")
        assert "output_dir" in fails_in_one_line(change(path, model="gpt2", **changes), capsys)
        assert not Path("gpt2").exists()


def test_an_adapter_may_lie_beside_its_base(workspace, tmp_path):
    base = with_base(workspace, tmp_path / "base")
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    path = training_file(workspace, tmp_path, output_dir=str(base))
    assert main(["train", str(change(path, model=str(base)))]) == 0
    after = {file.name: file.read_bytes() for file in base.iterdir()}
    assert after.keys() - before.keys() == {ADAPTER, "hybrid_adapter_config.json"}
    assert before == {name: after[name] for name in before}


# --- positions


def test_more_tokens_than_learned_positions(workspace, tmp_path, capsys):
    _, tokenizer = load_base(str(workspace.base), torch.float32)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=16,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    base = tmp_path / "base"
    transformers.GPT2LMHeadModel(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapter = {"target_modules": ["c_attn", "c_fc"], "apply_lora_to": ["c_attn"]}
    path = change(training_file(workspace, tmp_path), model=str(base), hybrid_adapter=adapter)
    change(path, data={"sequence_length": 17})
    error = fails_in_one_line(path, capsys)
    assert "data.sequence_length: got 17, allowed: up to 16" in error
    change(path, data={"sequence_length": 16})
    assert main(["train", str(path)]) == 0


# --- lora_rank: auto


def test_a_resumed_run_keeps_the_ranks_that_were_chosen(workspace, tmp_path, capsys, monkeypatch):
    path = training_file(workspace, tmp_path, batch_size=2, seed=3, save_steps=2, precision="fp32")
    change(path, hybrid_adapter={"lora_rank": "auto"})
    assert main(["train", str(path), "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)["lora_rank"]
    whole = load_file(tmp_path / "out" / ADAPTER)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")  # as if it had been cut after step 3
    (tmp_path / "out" / ADAPTER).unlink()
    monkeypatch.setattr(run_module, "choose_ranks", None)
    assert main(["train", str(path), "--resume", "--json"]) == 0
    taken = json.loads(capsys.readouterr().out)["lora_rank"]
    assert {key: taken[key] for key in ("rank", "sizes")} == {
        key: chosen[key] for key in ("rank", "sizes")
    }
    assert "checkpoint-2" in taken["reason"]
    resumed = load_file(tmp_path / "out" / ADAPTER)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_ranks_are_chosen_on_the_device_of_training(workspace, tmp_path, monkeypatch):
    seen = []

    def choose(model, *arguments, **options):
        seen.append(model.device)
        raise KeyboardInterrupt

    device = property(lambda arguments: torch.device("meta"))
    monkeypatch.setattr(transformers.TrainingArguments, "device", device)
    monkeypatch.setattr(run_module, "choose_ranks", choose)
    path = change(training_file(workspace, tmp_path), hybrid_adapter={"lora_rank": "auto"})
    main(["train", str(path)])
    assert seen == [torch.device("meta")]


def test_a_resumed_runs_rate_is_of_its_own_steps(workspace, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(
        run_module, "tokens_per_second", lambda trainer, output, first: begun.append(first) or 1.0
    )
    path = training_file(workspace, tmp_path, save_steps=3)
    assert main(["train", str(path)]) == 0
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    assert main(["train", str(path), "--resume"]) == 0
    assert begun == [0, 3]


# --- several processes


IN_ONE_PROCESS = """
import os, sys
from dataclasses import replace
from torch import distributed
from artemis.cli import main
from artemis.training import run

def choose(*arguments, chosen=run.choose_ranks, **options):
    # A GPU's sums can differ so far that a process chooses another rank.
    choice = chosen(*arguments, **options)
    rank = choice.rank + int(os.environ["RANK"])
    return replace(choice, rank=rank, config=replace(choice.config, lora_rank=rank))

run.choose_ranks = choose
status = main(sys.argv[1:])
# An open group's threads abort a process that ends before they have let go of its tensors.
sys.exit(status or int(distributed.is_initialized()))
"""


def test_two_processes_agree_on_the_ranks_and_one_reports(workspace, tmp_path):
    script = tmp_path / "one_process.py"
    script.write_text(IN_ONE_PROCESS)
    path = training_file(workspace, tmp_path, batch_size=2, max_steps=2)
    change(path, hybrid_adapter={"lora_rank": "auto"})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), "train", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert done.stderr.count(result["lora_rank"]["reason"]) == 1
    assert read_adapter(tmp_path / "out").parameters == result["trainable_parameters"]
