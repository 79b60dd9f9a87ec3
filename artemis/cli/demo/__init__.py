"""`artemis demo`: the main job on real text, with nothing downloaded.

A small byte-level Llama learns the source code of Python's standard library; then full fine-tuning,
the hybrid adapter and the same over the base in 8 bits each adapt it to English. What they cost and
reach is measured side by side, each in a process of its own, and the saved adapter is loaded again
in a fresh process.
"""

import argparse
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from artemis.errors import AdapterError
from artemis.training import default_device, resolve_precision
from artemis.training.output import require_writable

from .recipe import QUICK, Recipe, Workspace
from .report import ARMS, render, share_of_improvement

NAME = "demo"
SUMMARY = "train, save, reload and measure a hybrid adapter in a few minutes"
RELOAD_TOLERANCE = 1e-6  # relative; a GPU may sum in another order
EXAMPLE = "  artemis demo\n  artemis demo --text my_book.txt --json result.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="adapt to this text, not to Python's help topics"
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("artemis-demo"),
        help="where models and results go, and a base model to use again (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write what was measured here too"
    )


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    space = Workspace(args.directory, QUICK if args.quick else Recipe(), args.text)
    _check_text(space)
    require_writable(space.directory, "--directory")
    if args.json:
        _check_json(args.json)
    setting = _setting(space)
    _say(f"{setting['device']}, matrix products in {setting['precision']}")
    if space.base_is_ready():
        _say(f"using the base model in {space.base}")
    else:
        _remove_old_base(space)
        _run_stage("base", args)
    results = {stage: _run_stage(stage, args) for stage in (*ARMS, "reload")}
    _check_reload(results)
    _print_results(results)
    if args.json:
        share = share_of_improvement(results)
        summary = {"setting": setting, "arms": results, "share_of_improvement": share}
        args.json.write_text(json.dumps(summary) + "\n")
    _say(f"{(time.perf_counter() - started) / 60:.1f} minutes; models are in {space.directory}")


def _check_text(space: Workspace) -> None:
    """Fail on an unusable text before anything is trained."""
    if space.text is None:
        return
    if not space.text.is_file():
        raise FileNotFoundError(f"--text: {str(space.text)!r} does not exist or is not a file")
    least = space.recipe.batch_size
    if min(len(space.training_data("new")), len(space.held_out_data("new"))) < least:
        raise AdapterError(
            f"--text: {str(space.text)!r} is too short, allowed: a text of which a tenth holds"
            f" {least * space.recipe.sequence_length:,} bytes"
        )


def _check_json(file: Path) -> None:
    if file.is_dir() or not file.parent.is_dir():
        raise AdapterError(f"--json: got {str(file)!r}, allowed: a file in a folder that exists")
    require_writable(file.parent, "--json")


def _setting(space: Workspace) -> dict:
    """What the figures depend on."""
    device = default_device()
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "device": machine,
        "precision": str(resolve_precision("auto", device)).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "recipe": asdict(space.recipe),
        "text": None if space.text is None else str(space.text),
    }


def _remove_old_base(space: Workspace) -> None:
    """Make room for a new base; only what an earlier demo made is removed."""
    if not space.base.exists():
        return
    if not space.base_recipe.is_file():
        raise AdapterError(f"--directory: {space.base} exists, and no demo made it")
    shutil.rmtree(space.base)


def _run_stage(stage: str, args: argparse.Namespace) -> dict:
    """Run a stage in a fresh process and return what it measured."""
    command = [sys.executable, "-m", "artemis.cli.demo.stages", stage, str(args.directory)]
    command += ["--text", str(args.text)] if args.text else []
    command += ["--quick"] if args.quick else []
    status = subprocess.run(command, check=False).returncode
    if status:
        raise AdapterError(f"the stage {stage!r} ended with exit status {status}")
    return json.loads((args.directory / "results" / f"{stage}.json").read_text())


def _check_reload(results: dict[str, dict]) -> None:
    for key in ("new_loss", "old_loss"):
        trained, loaded = results["hybrid"][key], results["reload"][key]
        if not math.isclose(trained, loaded, rel_tol=RELOAD_TOLERANCE):
            raise AdapterError(f"{key} is {loaded} after loading the adapter, and was {trained}")


def _print_results(results: dict[str, dict]) -> None:
    reload = results["reload"]
    print(f"{render(results)}\n")
    print("Losses are on held-out text, in nats per byte; each arm ran in a process of its own.")
    print(f"Loaded in a fresh process, the adapter has the loss {reload['new_loss']:.4f} again.")
    print("It continues a held-out passage after the mark |\n")
    print(f"{reload['prompt']}|{reload['generated']}\n")


def _say(message: str) -> None:
    print(f"demo: {message}", file=sys.stderr)
