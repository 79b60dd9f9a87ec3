"""`artemis info`: what a saved adapter, or a saved quantized base, holds."""

import argparse
import json
from dataclasses import asdict

from ..quantization.store import StoredBase, holds_base, read_stored
from ..saving.adapter_file import AdapterFile, read_adapter
from ..text_table import aligned

NAME = "info"
SUMMARY = "show what an adapter, or a quantized base, holds, module by module"
EXAMPLE = "  artemis info artemis-demo/hybrid"
SIZES = {"lora": "rank", "bottleneck": "width", "block": "width"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="folder or file of a saved adapter or base")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> None:
    if holds_base(args.path):
        base = read_stored(args.path)
        print(json.dumps(describe_base(base), indent=2) if args.json else render_base(base))
        return
    adapter = read_adapter(args.path)
    print(json.dumps(describe(adapter), indent=2) if args.json else render(adapter))


def describe(adapter: AdapterFile) -> dict:
    """Everything that the file says, as plain values."""
    return {
        "path": str(adapter.path),
        "library_version": adapter.library_version,
        "parameters": adapter.parameters,
        "base": adapter.base.to_dict(),
        "config": adapter.config.to_dict(),
        "heads": list(adapter.plan.heads),
        "modules": [asdict(module) for module in adapter.modules()],
    }


def describe_base(base: StoredBase) -> dict:
    """The same of a quantized base."""
    return {
        "path": str(base.path),
        "library_version": base.library_version,
        "class_name": base.class_name,
        "config": base.config,
        "report": base.report.to_dict(),
    }


def render_base(base: StoredBase) -> str:
    """What it is, and the report of its quantization."""
    size = f"{base.path.stat().st_size / 1e6:,.2f} MB"
    return (
        f"{base.path}: quantized base of {size}, written by artemis {base.library_version}\n"
        f"{base.class_name}, activation_bits {base.report.activation_bits}\n\n{base.report}"
    )


def render(adapter: AdapterFile) -> str:
    """A table with one line for each adapted module."""
    base, modules = adapter.base, adapter.modules()
    name = f" {base.name}" if base.name else ""
    rows = [("module", "kind", "size", "shared", "own")]
    for module in modules:
        size = f"{SIZES[module.kind]} {module.size}"
        rows.append((module.path, module.kind, size, f"{module.shared:,}", f"{module.own:,}"))
    lines = [
        f"{adapter.path}: hybrid adapter, written by artemis {adapter.library_version}",
        f"base: {base.class_name}{name}, {base.parameters:,} parameters",
        "",
        *aligned(rows, left=3),
        *(f"{head}  trained head, saved whole" for head in adapter.plan.heads),
        "",
        f"{len(modules)} modules, {adapter.parameters:,} parameters stored"
        " (shared: used by several modules and stored once)",
    ]
    return "\n".join(lines)
