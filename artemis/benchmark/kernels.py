"""`artemis bench kernels`: operations on real layers, beside their peers and their floor."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from ..errors import AdapterError
from ..training import default_device, resolve_precision
from . import groups
from .costs import PASSES
from .measure import measure
from .models import HEAD_SIZE, LARGE, architecture
from .operations import OPERATIONS, Operation, Sizes
from .records import Record
from .session import Session
from .timer import Timer

#: Layers that read one x.
GROUPS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
LAYERS = ("q", "k", "v", "o", "gate", "up", "down", "block", *GROUPS)
WIDTH_OF_RANK = 8  # a bottleneck's width over LoRA's rank, as in the default configuration
_LORA, _ADAPTER, _BLOCK = OPERATIONS
_CORE = ("q", "qkv", "gate", "gate_up", "down", "block")
_FEW = 16  # up to so many tokens, the core is about decoding: the forward alone, without dropout


@dataclass(frozen=True)
class Workload:
    """One operation on one layer, or on a group, of a model; `which` is one of PASSES."""

    model: str
    layer: str
    tokens: int
    rank: int
    dropout: float
    which: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.layer}"

    @property
    def operation(self) -> Operation:
        if self.layer in ("q", "k", "v", "o", "qkv"):
            return _LORA
        return _BLOCK if self.layer == "block" else _ADAPTER

    @property
    def sizes(self) -> Sizes:
        """Tokens, in, out (of a group all together), and the rank, or the width that it means."""
        if self.layer in GROUPS:
            members = self.members
            return members[0]._replace(n=sum(sizes.n for sizes in members))
        model = architecture(self.model)
        hidden, inner = model.hidden, model.intermediate
        heads = model.heads or hidden // HEAD_SIZE
        narrow = hidden * (model.key_value_heads or heads) // heads
        shapes = {
            "q": (hidden, hidden), "k": (hidden, narrow), "v": (hidden, narrow),
            "o": (hidden, hidden), "gate": (hidden, inner), "up": (hidden, inner),
            "down": (inner, hidden), "block": (hidden, hidden),
        }  # fmt: skip
        size = self.rank if self.operation is _LORA else WIDTH_OF_RANK * self.rank
        return Sizes(self.tokens, *shapes[self.layer], size)

    @property
    def members(self) -> tuple[Sizes, ...]:
        """Sizes of the layers of a group."""
        return tuple(replace(self, layer=layer).sizes for layer in GROUPS.get(self.layer, ()))

    def to_dict(self, dtype: torch.dtype) -> Record:
        """Plain values for a JSON line."""
        sizes = self.sizes
        return {
            "op": self.operation.name + ("_group" if self.members else ""),
            "layer": self.name, **sizes._asdict(),
            "dropout": self.dropout, "pass": self.which,
            "dtype": str(dtype).removeprefix("torch."),
        }  # fmt: skip


def workloads(
    models: Sequence[str] | None,
    layers: Sequence[str] | None,
    tokens: Sequence[int] | None,
    ranks: Sequence[int] | None,
    full: bool,
) -> list[Workload]:
    """The core, or with `full` the grid; what is given replaces either's values.

    Raises:
        AdapterError: an unknown model or layer, or a size below 1.
    """
    models = models or (list(LARGE) if full else ["llama-3.2-1b"])
    layers = layers or (LAYERS if full else _CORE)
    tokens = tokens or ([1, 16, 128, 1024, 8192, 32768] if full else [1, 1024])
    ranks = ranks or ([8, 16, 64] if full else [8])
    for model in models:
        architecture(model)
    for layer in layers:
        if layer not in LAYERS:
            raise AdapterError(f"--layers: got {layer!r}, allowed: {', '.join(LAYERS)}")
    for name, values in (("--tokens", tokens), ("--ranks", ranks)):
        for value in values:
            if value < 1:
                raise AdapterError(f"{name}: got {value}, allowed: integers from 1")
    found = [
        Workload(model, layer, count, rank, dropout, which)
        for model in models
        for count in tokens
        for rank in ranks
        for layer in layers
        for dropout, which in _ways(count, full)
    ]
    distinct: dict[tuple, Workload] = {}
    for work in found:  # layers of one shape are one workload
        key = work.model, work.operation.name, work.sizes, work.members, work.dropout, work.which
        distinct.setdefault(key, work)
    return list(distinct.values())


def _ways(tokens: int, full: bool) -> list[tuple[float, str]]:
    if full:
        return [(dropout, which) for dropout in (0.0, 0.1) for which in PASSES]
    return [(0.0, "forward")] if tokens <= _FEW else [(0.1, "both")]


def run(session: Session, wanted: Sequence[Workload], rounds: int) -> list[Record]:
    """Measure every workload; a row for each provider, saved as it comes."""
    device = default_device()
    dtype = resolve_precision("auto", device)
    timer = Timer(device, rounds)
    peaks = peaks_of(session)
    rows = []
    for work in tqdm(wanted, "workloads", disable=None, leave=False):
        about = work.to_dict(dtype)
        known = [row for row in session.records if about.items() <= row.items()]
        if not known:
            for row in list(_measured(work, dtype, device, timer, peaks)):
                session.save({"kind": "row", "table": "kernels", **about, **row})
                known.append(session.records[-1])
        rows += known
    return rows


def _measured(
    work: Workload, dtype: torch.dtype, device: torch.device, timer: Timer, peaks: Record
) -> Iterator[Record]:
    """A row for every provider."""
    if not work.members:
        return measure(work, dtype, device, timer, peaks)
    group = groups.Group(work.operation, work.members, work.dropout, work.which, work.name)
    return groups.measure(group, dtype, device, timer, peaks)


def peaks_of(session: Session) -> dict[str, float]:
    """`gflops` in the dtype that the operations run in, and `gbs`."""
    wide = resolve_precision("auto", default_device()) == torch.float32
    measured = session.peaks()
    return {
        "gflops": measured["gemm_fp32_gflops" if wide else "gemm_bf16_gflops"],
        "gbs": measured["copy_gbs"],
    }
