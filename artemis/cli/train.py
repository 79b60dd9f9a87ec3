"""`artemis train`: the job that a training file describes."""

import argparse
import json
from typing import Any

from ..training import RunConfig, default_device, keep_freed_memory, run_training
from ..training.processes import end_processes, is_first_process

NAME = "train"
SUMMARY = "train an adapter, or a whole model, as a YAML file says"
EXAMPLE = "  artemis train examples/train.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="training file; see examples/train.yaml")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last complete checkpoint"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> None:
    if default_device().type == "cpu":
        keep_freed_memory()
    result = run_training(RunConfig.from_yaml(args.config), resume=args.resume)
    if is_first_process():
        _print(result, args.json)
    end_processes()


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, allow_nan=False))
        return
    share = result["trainable_parameters"] / result["total_parameters"]
    print(f"trained {result['trainable_parameters']:,} parameters ({share:.2%} of the model)")
    if result["train_loss"] is None:
        print(f"{result['steps']:,} steps, all done before")
    else:
        print(f"{result['steps']:,} steps, {result['tokens_per_second']:,.0f} tokens/s")
        print(f"mean training loss {result['train_loss']:.4f} nats per token")
    if result["eval_loss"] is not None:
        print(f"held-out loss {result['eval_loss']:.4f} nats per token")
    print(f"saved in {result['output_dir']}")
