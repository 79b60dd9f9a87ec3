"""`artemis_kernels.tune` on a few layers: which strategy, and which tiles of each kernel.

Over tensors and packed weights, in training and at inference. The table that it writes is thrown
away: what it found stands in the rows, in the form of docs/tuning.md, and changes nothing that is
timed after it.
"""

import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from artemis_kernels import tune


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


def tuning(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """A row for every entry of the table, layer after layer."""
    dtype, rounds = ("float32", 1) if tiny else ("bfloat16", 9)
    with tempfile.TemporaryDirectory() as folder:
        for layer in TINY if tiny else LAYERS:
            found = tune(
                layer.shapes, [layer.rows], op=layer.op, weight=layer.weight, dtype=dtype,
                trains=layer.rows > 1, device=device, rounds=rounds, table=folder, progress=False,
            )  # fmt: skip
            for part, entries in found.items():
                for key, entry in entries.items():
                    about = {name: entry[name] for name in ("chosen", "usual", "rounds")}
                    row = {"kind": "tuned", "op": layer.op, "part": part, "key": key}
                    yield row | about | {"times": entry["ms"]}
