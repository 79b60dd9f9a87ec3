"""`artemis_kernels.tune` on a few layers: which strategy, and which tiles of each kernel.

Over tensors and packed weights, in training and at inference. The table that it writes is thrown
away: what it found stands in the rows, in the form of docs/tuning.md, and changes nothing that is
timed after it.
"""

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from artemis_kernels import tune

_LOOKED_AFTER = 0.5  # seconds between looks at the table


class Layer(NamedTuple):
    """One case; more than one row trains, but for what is frozen. A group has several shapes."""

    op: str
    shapes: tuple[tuple[int, int, int], ...]
    rows: int
    weight: str = "tensor"


#: Most telling first: the section ends when its time is up.
LAYERS = (
    Layer("lora_linear", ((4096, 4096, 16),), 8192),
    Layer("lora_linear_group", ((4096, 4096, 16), *2 * ((4096, 1024, 16),)), 8192),
    Layer("bottleneck_adapter", ((4096, 4096, 64),), 8192),
    Layer("frozen_linear:lora", ((4096, 4096, 16),), 1, "int8:auto"),
    Layer("adapter_linear", ((4096, 11008, 64),), 8192),
    Layer("quantized_linear", ((4096, 4096, 1),), 8192, "fp8:auto"),
    Layer("frozen_linear:folded", ((4096, 11008, 64),), 1, "int4:16"),
    Layer("lora_linear", ((4096, 1024, 16),), 8192, "int8:auto"),
    Layer("lora_linear", ((4096, 4096, 16),), 1),
    Layer("bottleneck_adapter", ((4096, 4096, 16),), 2048),
)
TINY = (
    Layer("lora_linear", ((32, 48, 8),), 16),
    Layer("lora_linear_group", ((32, 48, 8), (32, 16, 8)), 16),
    Layer("adapter_linear", ((32, 48, 8),), 16),
    Layer("adapter_linear", ((32, 48, 8),), 16, "int8:auto"),
    Layer("quantized_linear", ((32, 48, 8),), 1, "int4:16"),
    Layer("frozen_linear:lora", ((32, 48, 8),), 4, "int8:auto"),
    Layer("frozen_linear:plain", ((32, 48, 8),), 4, "int8:auto"),
)


def tuning(device: torch.device, tiny: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for every entry of the table, as it is written: a layer may outlast the section."""
    dtype = "float32" if tiny else "bfloat16"
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as one:
        seen: set[tuple[str, str]] = set()
        for layer in TINY if tiny else LAYERS:
            job = one.submit(
                tune, layer.shapes, [layer.rows], op=layer.op, weight=layer.weight, dtype=dtype,
                trains=layer.rows > 1, device=device, rounds=rounds, table=folder, progress=False,
            )  # fmt: skip
            while not job.done():
                wait([job], timeout=_LOOKED_AFTER)
                yield from _new(Path(folder), seen, layer.op)
            yield from _new(Path(folder), seen, layer.op)  # what came after the last look
            job.result()


def _new(folder: Path, seen: set[tuple[str, str]], op: str) -> Iterator[dict[str, Any]]:
    """Rows of the entries that are not `seen` yet."""
    for table in folder.glob("*.json"):
        for part, entries in json.loads(table.read_text(encoding="utf-8")).items():
            for key in entries.keys() - {key for of, key in seen if of == part}:
                seen.add((part, key))
                about = {name: entries[key][name] for name in ("chosen", "usual", "rounds")}
                # "tuned" is a row of bench/tuned.py, and results are read together.
                row = {"kind": "tuning", "op": op, "part": part, "key": key}
                yield row | about | {"times": entries[key]["ms"]}
