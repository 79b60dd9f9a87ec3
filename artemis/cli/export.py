"""`artemis export`: the LoRA of a saved adapter, as files for PEFT or vLLM."""

import argparse
import json
from dataclasses import asdict

from ..interchange import FORMS, export_adapter

NAME = "export"
SUMMARY = "write the LoRA of a saved adapter as files for PEFT or vLLM"
EXAMPLE = "  artemis export my-adapter for-vllm --form vllm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or file of a saved adapter")
    parser.add_argument("directory", metavar="DIRECTORY", help="where to write; made where missing")
    parser.add_argument(
        "--form",
        choices=FORMS,
        default="peft",
        help="peft: each module with its own rank; vllm: one rank, no factors (default: peft)",
    )
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="leave out what the files have no place for: what is exported is another model",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> None:
    report = export_adapter(
        args.adapter, args.directory, form=args.form, allow_partial=args.allow_partial
    )
    if args.json:
        print(json.dumps(asdict(report) | {"path": str(report.path)}, indent=2))
    else:
        print(report)
