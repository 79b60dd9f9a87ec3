"""One operation on one layer, ready to be timed: what everybody computes, checked.

A provider that fails the accuracy rule, or does not run at all, has no call. Peers draw dropout
masks of their own and are checked without.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

import artemis_kernels

from ..out_of_memory import is_out_of_memory
from . import packed
from .inference import at_inference, weight_of
from .operations import (
    SEED,
    Operation,
    Sizes,
    Tensors,
    Truth,
    Verdict,
    operands,
    relative_error,
)
from .peers import OWN_TENSORS, Run, peers
from .records import Record

LEARN = ("x", "lora_a", "lora_b", "down", "up")  # no bias is timed, and the scale is a constant 1
_CHECKED = 1 << 35  # multiply-adds up to which a gate takes all tokens
_GATE_TOKENS = 128  # else


class Work(Protocol):
    """What is measured; `which` is one of `costs.PASSES`, `name` says where the layer is from."""

    operation: Operation
    sizes: Sizes
    dropout: float
    which: str
    name: str


Weights = dict[str, artemis_kernels.QuantizedWeight]
#: `(work, tensors, dropout)` -> more providers of Artemis by name: other ways of the operation.
More = Callable[[Work, Tensors, float], dict[str, Run]]


class Prepared(NamedTuple):
    """`rows` holds everybody's verdict, `calls` runs the pass once, by those that passed."""

    tensors: Tensors
    weights: Weights
    ways: dict[str, Run]
    rows: dict[str, Record]
    calls: dict[str, Callable[[], object]]


def prepare(
    work: Work,
    dtype: torch.dtype,
    device: torch.device,
    more: More | None = None,
    impl: str | None = None,
    failures: tuple[type[Exception], ...] = (RuntimeError,),
    compiles: bool = True,
) -> Prepared:
    """Everybody's operands and verdict.

    `impl` is what the public functions are called with; one of `failures` (of a launch, or of a
    compiler that is not whole) fails its provider, not the run. `compiles`: whether `torch.compile`
    is among the peers, which takes it seconds.
    """
    torch.manual_seed(0)
    every = operands(work.operation, work.sizes, dtype, device)
    tensors = {name: every[name] for name in ("weight", *LEARN) if name in every}
    weights = packed.quantized(tensors)
    ways = {p: _providers(work, tensors, p, weights, more, impl) for p in {0.0, work.dropout}}
    if not compiles:
        for way in ways.values():
            way.pop("compile", None)
    rows = _checked(work, tensors, weights, ways, impl, failures)
    calls = {}
    for name, run in ways[work.dropout].items():
        if not rows[name]["gate"]["passed"]:
            continue
        learns, own = ("x",) if name == "bare" else LEARN, OWN_TENSORS.get(name, dict)(tensors)
        try:
            call = _call(run, own, work.which, learns)
            call()  # with the dropout that a peer was checked without
        except failures as failure:
            rows[name]["gate"] = _failed(failure)
        else:
            calls[name] = call
    return Prepared(tensors, weights, ways[work.dropout], rows, calls)


def _providers(
    work: Work,
    tensors: Tensors,
    dropout: float,
    weights: Weights,
    more: More | None,
    impl: str | None,
) -> dict[str, Run]:
    """`artemis`, the public function, also over packed weights and at inference, and its peers."""

    def artemis(t: Tensors) -> torch.Tensor:
        return work.operation.public(t, dropout_p=dropout, seed=SEED, impl=impl)

    infers = work.which == "forward" and not work.dropout
    return {
        "artemis": artemis,
        **({} if more is None else more(work, tensors, dropout)),
        **{n: packed.provider(work.operation, w, dropout, impl) for n, w in weights.items()},
        **(at_inference(work.operation, tensors, weights, impl) if infers else {}),
        **peers(work.operation, work.sizes, tensors, dropout),
    }


def _checked(
    work: Work,
    tensors: Tensors,
    weights: Weights,
    ways: dict[float, dict[str, Run]],
    impl: str | None,
    failures: tuple[type[Exception], ...],
) -> dict[str, Record]:
    """Verdict and error of every provider.

    Gradients are checked where a backward is timed; where that would take long, on fewer tokens.
    """
    m, k, n, _ = work.sizes
    few = m * k * n > _CHECKED and tensors["x"].device.type == "cpu"
    tensors = tensors | {"x": tensors["x"][:_GATE_TOKENS]} if few else tensors
    wanted = tuple(n for n in LEARN if n in tensors) if work.which != "forward" else ()
    truths = {p: Truth(work.operation, tensors, wanted, dropout_p=p) for p in ways}
    rows: dict[str, Record] = {}
    for name in ways[0.0]:
        dropout = work.dropout if name.startswith("artemis") else 0.0
        run, weight, truth = ways[dropout][name], weight_of(name, weights), truths[dropout]
        if name == "bare":
            rows[name] = {"gate": {"passed": True}}
            continue
        try:
            if weight is None:
                verdict = truth.judge(run)
            else:
                stands_for = {"weight": weight.dequantize(tensors["x"].dtype)}
                truth = Truth(work.operation, tensors | stands_for, wanted, dropout_p=dropout)
                verdict = packed.judge(work.operation, weight, run, truth, impl)
            error = relative_error(run(tensors), truth.exact["y"])
            rows[name] = {"gate": verdict.to_dict(), "error": error}
        except failures as failure:
            rows[name] = {"gate": _failed(failure)}
    return rows


def _failed(failure: Exception) -> Record:
    """`passed` is None where memory ran out: what did not run is not known to be wrong."""
    verdict = Verdict(None, f"{type(failure).__name__}: {failure}"[:300]).to_dict()
    no_memory = is_out_of_memory(failure) or "out of memory" in str(failure)  # Triton's, cuBLAS'
    return verdict | {"passed": None} if no_memory else verdict


def _call(run: Run, tensors: Tensors, which: str, learns: tuple[str, ...]) -> Callable[[], object]:
    """A call that runs the pass `which` once."""
    leaves = leaves_of(tensors, which, learns)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    if which == "forward":
        return lambda: run(leaves)
    y = run(leaves)
    dy = torch.randn_like(y)
    if which == "backward":
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)
    return lambda: torch.autograd.grad(run(leaves), wanted, dy)


def leaves_of(tensors: Tensors, which: str, learns: tuple[str, ...]) -> Tensors:
    """The tensors anew; those that learn require a gradient unless only the forward is asked."""
    return {
        name: tensor.detach().requires_grad_(which != "forward" and name in learns)
        for name, tensor in tensors.items()
    }
