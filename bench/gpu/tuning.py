"""`artemis_kernels.tune` on a few layers: which strategy, and which tiles of each kernel.

The table that it writes is thrown away: what it found stands in the rows, in the form of
docs/tuning.md, and changes nothing that is timed after it.
"""

import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from artemis_kernels import tune


def tuning(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """A row for every entry of the table, layer after layer."""
    if tiny:
        layers = [("lora_linear", (32, 48, 8), 16), ("adapter_linear", (32, 48, 8), 16)]
    else:
        layers = [
            ("lora_linear", (4096, 4096, 16), 8192),
            ("adapter_linear", (4096, 11008, 64), 8192),
            ("bottleneck_adapter", (4096, 4096, 64), 8192),
            ("lora_linear", (4096, 1024, 16), 8192),
            ("lora_linear", (4096, 4096, 16), 1),
        ]
    dtype, rounds = ("float32", 1) if tiny else ("bfloat16", 9)
    with tempfile.TemporaryDirectory() as folder:
        for op, shape, rows in layers:
            found = tune(
                [shape], [rows], op=op, dtype=dtype, trains=rows > 1, device=device,
                rounds=rounds, table=folder, progress=False,
            )  # fmt: skip
            for part, entries in found.items():
                for key, entry in entries.items():
                    about = {name: entry[name] for name in ("chosen", "usual", "rounds")}
                    times = {"times": entry["ms"]}
                    yield {"kind": "tuned", "op": op, "part": part, "key": key, **about, **times}
