"""What `artemis_kernels.tune` chooses for a few layers: strategies, then the tiles of each kernel.

Over tensors and packed weights, in training and at inference. The table that it writes is thrown
away: what it found stands in the rows, in the form of docs/tuning.md, and changes nothing that is
timed after it. Strategies come first, by default tiles, and of tiles only the most likely ones:
`tune` itself looks at more.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

from artemis_kernels.core import device as devices
from artemis_kernels.core import tables
from artemis_kernels.core.strategies import Case
from artemis_kernels.core.tiling import next_power_of_2
from artemis_kernels.tuner import search
from artemis_kernels.tuner.requests import calls_of

from .failures import Row, contained

_MOST_TILES = 8  # of a kernel and shape, beside the default
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


def tuning(device: torch.device, tiny: bool, rounds: int) -> Iterator[Row]:
    """A row for every entry of the table, as it is written: a layer may outlast the section."""
    dtype = "float32" if tiny else "bfloat16"
    chip = None if device.type == "cpu" else devices.chip(device)
    layers = {layer: _calls(layer, dtype) for layer in (TINY if tiny else LAYERS)}
    jobs = [("strategies", layer.op, search.of_calls, calls) for layer, calls in layers.items()]
    if chip is not None:
        jobs.append(("tiles", "all of them", _tiles(rounds), tuple(chain(*layers.values()))))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as one:
        path, seen = tables.path_of(Path(folder), tables.name_of(chip)), set()
        for part, op, find, calls in jobs:
            job = one.submit(find, calls, path, chip, device, rounds=rounds, progress=False)
            key = ", ".join(case.key for members in calls for case in members)
            about = {"kind": "tuning", "op": op, "part": part, "key": key}
            yield from contained(_rows(job, path, seen, op), about)


def _tiles(rounds: int) -> Callable[..., object]:
    """The search for tiles, all at once: processes that compile start once, and go ahead."""
    from artemis_kernels.tuner import tiles

    workers = {"workers": 1} if rounds == 1 else {}  # a rehearsal leaves cores to the others
    return partial(tiles.search, most=_MOST_TILES, **workers)


def _calls(layer: Layer, dtype: str) -> tuple[tuple[Case, ...], ...]:
    rows = (next_power_of_2(layer.rows),)
    trains, drops = layer.rows > 1, False
    return tuple(
        calls_of(layer.op, layer.shapes, rows, dtype, layer.weight, trains, drops).values()
    )


def _rows(job: Future, path: Path, seen: set, op: str) -> Iterator[Row]:
    while not job.done():
        wait([job], timeout=_LOOKED_AFTER)
        yield from _new(path, seen, op)
    yield from _new(path, seen, op)  # what came after the last look
    job.result()


def _new(path: Path, seen: set[tuple[str, str]], op: str) -> Iterator[Row]:
    """Rows of the table's entries that are not `seen` yet."""
    if not path.exists():
        return
    for part, entries in json.loads(path.read_text(encoding="utf-8")).items():
        for key in entries.keys() - {key for of, key in seen if of == part}:
            seen.add((part, key))
            about = {name: entries[key][name] for name in ("chosen", "usual", "rounds")}
            # "tuned" is a row of bench/tuned.py, and results are read together.
            row = {"kind": "tuning", "op": op, "part": part, "key": key}
            yield row | about | {"times": entries[key]["ms"]}
