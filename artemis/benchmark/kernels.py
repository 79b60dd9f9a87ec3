"""`artemis bench kernels`: single operations on real layers, beside their peers and their floor."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

import artemis_kernels

from ..errors import AdapterError
from ..training import default_device, resolve_precision
from .costs import PASSES, cost_of_pass
from .models import HEAD_SIZE, LARGE, architecture
from .operations import OPERATIONS, SEED, Operation, Sizes, Tensors, Truth, operands, relative_error
from .peers import Run, peers
from .runner import Spread
from .session import Record, Session
from .timer import Timer

LAYERS = ("q", "k", "v", "o", "gate", "up", "down", "block")
WIDTH_OF_RANK = 8  # a bottleneck's width over LoRA's rank, as in the default configuration
_LORA, _ADAPTER, _BLOCK = OPERATIONS
_LEARN = ("x", "lora_a", "lora_b", "down", "up")  # no bias is timed, and the scale is a constant 1
_FEW = 16  # up to so many tokens, the core is about decoding: the forward alone, without dropout
_CHECKED = 1 << 35  # multiply-adds up to which a gate takes all tokens
_GATE_TOKENS = 128  # else


@dataclass(frozen=True)
class Workload:
    """One operation on one layer of a model; `which` is one of PASSES."""

    model: str
    layer: str
    tokens: int
    rank: int
    dropout: float
    which: str

    @property
    def operation(self) -> Operation:
        if self.layer in ("q", "k", "v", "o"):
            return _LORA
        return _BLOCK if self.layer == "block" else _ADAPTER

    @property
    def sizes(self) -> Sizes:
        """Tokens, in, out, and the rank, or the width that goes with it."""
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

    def to_dict(self, dtype: torch.dtype) -> Record:
        """Plain values for a JSON line."""
        sizes = self.sizes
        return {
            "op": self.operation.name, "layer": f"{self.model} {self.layer}", **sizes._asdict(),
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
    layers = layers or (LAYERS if full else ("q", "gate", "down", "block"))
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
        key = work.model, work.operation.name, work.sizes, work.dropout, work.which
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
            for row in list(measure(work, dtype, device, timer, peaks)):
                session.save({"kind": "row", "table": "kernels", **about, **row})
                known.append(session.records[-1])
        rows += known
    return rows


def peaks_of(session: Session) -> dict[str, float]:
    """`gflops` in the dtype that the operations run in, and `gbs`."""
    wide = resolve_precision("auto", default_device()) == torch.float32
    measured = session.peaks()
    return {
        "gflops": measured["gemm_fp32_gflops" if wide else "gemm_bf16_gflops"],
        "gbs": measured["copy_gbs"],
    }


def measure(
    work: Workload, dtype: torch.dtype, device: torch.device, timer: Timer, peaks: Record
) -> Iterator[Record]:
    """A row for every provider: verdict, times, rates, and ratios to floor and best peer."""
    torch.manual_seed(0)
    every = operands(work.operation, work.sizes, dtype, device)
    tensors = {name: every[name] for name in ("weight", *_LEARN) if name in every}
    rows = checked(work, tensors)
    calls = {
        name: _call(run, tensors, work.which, learns=("x",) if name == "bare" else _LEARN)
        for name, run in providers(work, tensors, work.dropout).items()
        if rows[name]["gate"]["passed"]
    }
    for name, times in timer.interleaved(calls).items():
        rows[name]["ms"] = Spread.of(times).to_dict(5)
    best = [rows[n]["ms"]["p50"] for n in ("plain", "addmm", "peft") if "ms" in rows.get(n, {})]
    choice = artemis_kernels.explain(
        work.operation.name,
        **{"scale": 1.0} | _leaves(tensors, work.which, _LEARN),
        dropout_p=work.dropout,
    )
    rows["artemis"] |= {"impl": choice.impl, "strategy": choice.strategy}
    for name, row in rows.items():
        if "ms" in row:
            seconds = row["ms"]["p50"] / 1e3
            needed = cost_of_pass(
                work.operation, work.sizes, name, choice.cost, dtype.itemsize, work.which
            )
            floor = max(needed.flops / peaks["gflops"], needed.bytes / peaks["gbs"]) / 1e9
            row |= {
                "gflops": needed.flops / seconds / 1e9, "gbs": needed.bytes / seconds / 1e9,
                "intensity": needed.flops / needed.bytes, "over_floor": seconds / floor,
                "over_best_peer": row["ms"]["p50"] / min(best),
            }  # fmt: skip
        yield {"provider": name, "what": f"{name} on {work.model} {work.layer}", **row}


def providers(work: Workload, tensors: Tensors, dropout: float) -> dict[str, Run]:
    """`artemis`, the public function, and its peers."""

    def artemis(t: Tensors) -> torch.Tensor:
        return work.operation.public(t, dropout_p=dropout, seed=SEED)

    return {"artemis": artemis, **peers(work.operation, work.sizes, tensors, dropout)}


def checked(work: Workload, tensors: Tensors) -> dict[str, dict[str, Any]]:
    """Verdict and error of every provider; a peer draws masks of its own, and is checked without.

    Gradients are checked where a backward is timed; where that would take long, on fewer tokens.
    """
    m, k, n, _ = work.sizes
    few = m * k * n > _CHECKED and tensors["x"].device.type == "cpu"
    tensors = tensors | {"x": tensors["x"][:_GATE_TOKENS]} if few else tensors
    wanted = tuple(n for n in _LEARN if n in tensors) if work.which != "forward" else ("x",)
    truths = {p: Truth(work.operation, tensors, wanted, dropout_p=p) for p in {0.0, work.dropout}}
    rows = {"bare": {"gate": {"passed": True}}} if "weight" in tensors else {}
    for name in providers(work, tensors, 0.0):
        if name == "bare":
            continue
        dropout = work.dropout if name == "artemis" else 0.0
        run, truth = providers(work, tensors, dropout)[name], truths[dropout]
        error = relative_error(run(tensors), truth.exact["y"])
        rows[name] = {"gate": truth.judge(run).to_dict(), "error": error}
    return rows


def _call(run: Run, tensors: Tensors, which: str, learns: tuple[str, ...]) -> Callable[[], object]:
    """A call that runs the pass `which` once."""
    leaves = _leaves(tensors, which, learns)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    if which == "forward":
        return lambda: run(leaves)
    y = run(leaves)
    dy = torch.randn_like(y)
    if which == "backward":
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)
    return lambda: torch.autograd.grad(run(leaves), wanted, dy)


def _leaves(tensors: Tensors, which: str, learns: tuple[str, ...]) -> Tensors:
    """The tensors anew; those that learn require a gradient unless only the forward is asked."""
    return {
        name: tensor.detach().requires_grad_(which != "forward" and name in learns)
        for name, tensor in tensors.items()
    }
