"""Files that commands are given."""

from pathlib import Path

import yaml

from artemis.cli.demo.corpus import help_topics
from artemis.cli.demo.recipe import Workspace


def training_file(workspace: Workspace, directory: Path, **training) -> Path:
    """A training file for the workspace's base model, with a small adapter."""
    train, held_out = help_topics()
    (directory / "train.txt").write_text(train[0])
    (directory / "held_out.txt").write_text(held_out[0])
    values = {
        "model": str(workspace.directory / "base"),
        "data": {
            "train": str(directory / "train.txt"),
            "eval": str(directory / "held_out.txt"),
            "sequence_length": 16,
        },
        "hybrid_adapter": {"lora_rank": 2, "adapter_size": 4},
        "training": {"output_dir": str(directory / "out"), "max_steps": 4} | training,
    }
    path = directory / "train.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
