"""`lora_rank: auto` in a training file."""

import json

import yaml

from artemis import read_adapter
from artemis.cli import main

from .files import training_file


def test_a_training_file_can_leave_the_rank_to_the_data(workspace, tmp_path, capsys):
    path = training_file(workspace, tmp_path, batch_size=2, seed=3)
    values = yaml.safe_load(path.read_text())
    values["hybrid_adapter"]["lora_rank"] = "auto"
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path), "--json"]) == 0
    captured = capsys.readouterr()
    chosen = json.loads(captured.out)["lora_rank"]
    saved = read_adapter(tmp_path / "out")
    assert saved.config.lora_rank == chosen["rank"]
    assert {site.path: site.size for site in saved.plan.sites} == chosen["sizes"]
    assert len(set(chosen["sizes"].values())) > 1
    assert chosen["reason"] in captured.err


def test_a_rank_that_is_given_is_taken(workspace, tmp_path, capsys):
    assert main(["train", str(training_file(workspace, tmp_path)), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lora_rank"] is None
