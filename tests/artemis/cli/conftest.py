"""A quick demo; and only its base model and adapter, made in this process, for other commands."""

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

import pytest

from artemis.cli import main
from artemis.cli.demo import stages
from artemis.cli.demo.recipe import QUICK, Workspace


class Demo(NamedTuple):
    directory: Path
    status: int
    output: str
    json: Path


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Demo:
    directory = tmp_path_factory.mktemp("demo")
    summary = directory / "summary.json"
    arguments = ["demo", "--quick", "--directory", str(directory), "--json", str(summary)]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = main(arguments)
    return Demo(directory, status, output.getvalue(), summary)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Workspace:
    """Holds `base/`, a model with its tokenizer, and `hybrid/`, an adapter for it."""
    space = Workspace(tmp_path_factory.mktemp("workspace"), QUICK)
    stages.base(space)
    stages.hybrid(space)
    return space
