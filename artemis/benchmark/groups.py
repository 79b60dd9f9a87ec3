"""Layers that read one x (q, k and v; gate and up) as one operation, beside one by one and peers.

A member is a mapping of tensors as in `operations`; all members of a group hold the same x. Truth
is each member's fp64 reference; peers draw dropout masks of their own and are checked without.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional

import artemis_kernels
from artemis_kernels import Cost

from .costs import cost_of_pass, rates
from .inference import FROZEN, AtInference
from .operations import (
    SEED,
    Operation,
    Sizes,
    Tensors,
    Verdict,
    operands,
    relative_error,
)
from .peers import HAS_PEFT, PEERS, addmm, can_compile, compiled, peft_layer, plain
from .records import Record
from .timer import Timer

Members = Sequence[Tensors]
Run = Callable[[Members], Sequence[torch.Tensor]]
Weights = Sequence[artemis_kernels.QuantizedWeight]
_FACTORS = {"lora_linear": ("lora_a", "lora_b"), "adapter_linear": ("down", "up")}
_PACKED = "int8"
_ROUNDING = 0.02  # relative, of rows rounded to 8 bits
_CHECKED_TOKENS = 128


class Group(NamedTuple):
    """`operation` on layers of `members`' sizes, which agree in rows and in features."""

    operation: Operation
    members: tuple[Sizes, ...]
    dropout: float
    which: str
    name: str


def measure(
    group: Group,
    dtype: torch.dtype,
    device: torch.device,
    timer: Timer,
    peaks: Record,
    impl: str | None = None,
) -> Iterator[Record]:
    """A row for every provider: verdict, times, rates, and ratios to floor and best peer."""
    torch.manual_seed(0)
    members = _members(group, dtype, device)
    weights = [artemis_kernels.QuantizedWeight.quantize(m["weight"], _PACKED) for m in members]
    ways = _ways(group, members, weights, impl, group.dropout)
    rows = _checked(group, members, weights, impl)
    calls = {
        name: _call(group, run, members, learns=name != "bare")
        for name, run in ways.items()
        if rows[name]["gate"]["passed"]
    }
    # As in `measure`: a backward alone cannot be captured.
    for name, times in timer.rows(calls, graphs=group.which != "backward").items():
        rows[name] |= times
    timed = [rows[name]["ms"]["p50"] for name in PEERS if "ms" in rows.get(name, {})]
    for name, row in rows.items():
        if "ms" in row:
            needed = _needed(group, members, weights if _PACKED in name else None, name)
            row |= rates(needed, row["ms"]["p50"], peaks, timed)
        yield {"provider": name, "what": f"{name} on {group.name}", **row}


def _members(group: Group, dtype: torch.dtype, device: torch.device) -> Members:
    """Balanced operands of every member, x shared; no biases, and a scale of 1."""
    names = ("weight", *_FACTORS[group.operation.name])
    every = [operands(group.operation, sizes, dtype, device) for sizes in group.members]
    return [{"x": every[0]["x"], **{name: each[name] for name in names}} for each in every]


def _ways(
    group: Group, members: Members, weights: Weights, impl: str | None, dropout: float
) -> dict[str, Run]:
    """The group, its members one by one, the group over int8, at inference, and the peers."""
    options = {"dropout_p": dropout, "seed": SEED, "impl": impl}
    ways: dict[str, Run] = {
        "artemis": partial(_joined, group.operation, options=options),
        "artemis, one by one": _each([partial(group.operation.public, **options)] * len(members)),
        f"artemis, {_PACKED}": partial(_joined, group.operation, options=options, weights=weights),
    }
    if group.which == "forward" and not group.dropout:
        for name, held in (("", [m["weight"] for m in members]), (f", {_PACKED}", weights)):
            layers = zip(members, held, strict=True)
            frozen = [AtInference(group.operation, m, weight, impl) for m, weight in layers]
            ways[f"artemis{name}{FROZEN}"] = _each(frozen)
    for name, peer in (("plain", plain), ("addmm", addmm)):
        ways[name] = _each([peer(group.operation, dropout)] * len(members))
    if can_compile(members[0]["x"].device):
        ways["compile"] = compiled(ways["plain"])
    if group.operation.name == "lora_linear" and HAS_PEFT:
        layers = zip(group.members, members, strict=True)
        ways["peft"] = _each([peft_layer(sizes, dropout, m["weight"]) for sizes, m in layers])
    ways["bare"] = _each([lambda t: functional.linear(t["x"], t["weight"])] * len(members))
    return ways


def _each(runs: Sequence[Callable[[Tensors], torch.Tensor]]) -> Run:
    """Every member by a run of its own."""
    return lambda members: [run(m) for run, m in zip(runs, members, strict=True)]


def _joined(
    operation: Operation, members: Members, options: Record, weights: Weights | None = None
) -> Sequence[torch.Tensor]:
    run = getattr(artemis_kernels, f"{operation.name}_group")
    first, second = ([m[name] for m in members] for name in _FACTORS[operation.name])
    held = weights or [m["weight"] for m in members]
    return run(members[0]["x"], held, first, second, scales=[1.0] * len(members), **options)


def _leaves(group: Group, members: Members, learns: bool = True) -> tuple[Members, list]:
    """The members anew over one x, and what requires a gradient: x and, if `learns`, factors."""
    x = members[0]["x"].detach().requires_grad_()
    wanted, found = [x], []
    for member in members:
        anew = {name: tensor.detach() for name, tensor in member.items()} | {"x": x}
        if learns:
            wanted += [anew[name].requires_grad_() for name in _FACTORS[group.operation.name]]
        found.append(anew)
    return found, wanted


def _call(group: Group, run: Run, members: Members, learns: bool) -> Callable[[], object]:
    """A call that runs the group's pass once."""
    if group.which == "forward":
        return lambda: run(members)
    leaves, wanted = _leaves(group, members, learns)
    ys = run(leaves)
    dys = [torch.randn_like(y) for y in ys]
    if group.which == "backward":
        return lambda: torch.autograd.grad(ys, wanted, dys, retain_graph=True)
    return lambda: torch.autograd.grad(run(leaves), wanted, dys)


def _outcome(group: Group, run: Run, members: Members, dys: Members) -> list[torch.Tensor]:
    """Every y, then, unless only the forward is timed, the gradients of x and of every factor."""
    if group.which == "forward":
        return list(run(members))
    leaves, wanted = _leaves(group, members)
    ys = run(leaves)
    gradients = torch.autograd.grad(ys, wanted, [dy.to(y) for dy, y in zip(dys, ys, strict=True)])
    return [*(y.detach() for y in ys), *gradients]


def _checked(
    group: Group, members: Members, weights: Weights, impl: str | None
) -> dict[str, Record]:
    """Verdict and error of every provider, on a few rows: outputs and all gradients.

    The limit of an error is twice the reference's in the same dtype, over int8 also the rounding.
    """
    x = members[0]["x"][:_CHECKED_TOKENS]
    members = [member | {"x": x} for member in members]
    dys = [torch.randn(len(x), sizes.n).to(x) for sizes in group.members]
    rounded = [
        member | {"weight": weight.dequantize(x.dtype)}
        for member, weight in zip(members, weights, strict=True)
    ]
    rows: dict[str, Record] = {}
    for dropout, of_peers in ((group.dropout, False), (0.0, True)):
        for name, run in _ways(group, members, weights, impl, dropout).items():
            if name.startswith("artemis") == of_peers:
                continue
            if name == "bare":
                rows[name] = {"gate": {"passed": True}}
                continue
            is_packed = _PACKED in name
            given = rounded if is_packed else members
            verdict, error = _judged(group, run, given, dys, dropout, is_packed)
            rows[name] = {"gate": verdict.to_dict(), "error": error}
    return rows


def _judged(
    group: Group, run: Run, members: Members, dys: Sequence, dropout: float, is_packed: bool
) -> tuple[Verdict, float]:
    """The largest error over its limit, and the relative error of the first output."""
    options = {"dropout_p": dropout, "seed": SEED, "impl": "reference"}
    reference = _each([partial(group.operation.public, **options)] * len(members))
    doubles = [{name: tensor.double() for name, tensor in m.items()} for m in members]
    exact = _outcome(group, reference, doubles, dys)
    usual = _outcome(group, reference, members, dys)
    found = _outcome(group, run, members, dys)
    verdicts = []
    for number, (f, u, e) in enumerate(zip(found, usual, exact, strict=True)):
        limit = 2 * relative_error(u, e) + 1e-6 + _ROUNDING * is_packed
        error = relative_error(f, e)
        ratio = error / limit if math.isfinite(error) else None
        verdicts.append(Verdict(ratio, f"result {number}"))
    worst = max(verdicts, key=lambda v: math.inf if v.ratio is None else v.ratio)
    return worst, relative_error(found[0], exact[0])


def _needed(group: Group, members: Members, weights: Weights | None, provider: str) -> Cost:
    """FLOPs and bytes of the pass: those of the members, x read (and dX written) once."""
    total = Cost(0, 0)
    size = members[0]["x"].itemsize
    for number, (sizes, member) in enumerate(zip(group.members, members, strict=True)):
        choice = artemis_kernels.explain(
            group.operation.name, **member, scale=1.0, dropout_p=group.dropout
        )
        held = None if weights is None else weights[number].nbytes
        cost = cost_of_pass(group.operation, sizes, provider, choice.cost, size, group.which, held)
        total = total + cost
    backward = 1 if provider == "bare" else 2  # dX, and x again for the factors' gradients
    passes = {"forward": 1, "backward": backward, "both": 1 + backward}[group.which]
    rows, features = group.members[0][:2]
    return total + Cost(0, -(len(members) - 1) * passes * size * rows * features)
