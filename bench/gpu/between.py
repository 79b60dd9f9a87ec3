"""What stands between a transformer's products, beside torch as transformers composes it."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional

import artemis_kernels
from artemis.benchmark.operations import Verdict
from artemis.benchmark.peaks import copy
from artemis.benchmark.timer import Timer

from .failures import FAILURES, Row, contained, failure, tried

_EPS = 1e-5
_RELATIVE = 4e-6  # of a row's largest number: sums, roots and exponentials in fp32
_FP16_STEP = 2.0**-25  # half of one between its smallest numbers
_JUDGED_ROWS = 256  # in fp64
Function = Callable[..., Any]


class Case(NamedTuple):
    """A call of `op` on tensors of which the first `learns` get gradients, and what flows back.

    `elements`: those that must be moved forward, and with the backward.
    """

    op: str
    sizes: dict[str, int]
    tensors: tuple[torch.Tensor, ...]
    learns: int
    upstream: tuple[torch.Tensor, ...]
    elements: tuple[int, int]
    option: Any = ()  # a last argument

    def run(self, function: Function) -> tuple[torch.Tensor, ...]:
        """The results, without gradients."""
        with torch.no_grad():
            return _tuple(function(*self.tensors, *self.option))

    def trained(self, function: Function) -> tuple[torch.Tensor, ...]:
        """The results, and the gradients of what learns."""
        leaves = [tensor.detach().requires_grad_() for tensor in self.tensors[: self.learns]]
        results = _tuple(function(*leaves, *self.tensors[self.learns :], *self.option))
        return results + torch.autograd.grad(results, leaves, self.upstream)

    def double(self) -> "Case":
        """The same numbers in fp64."""
        wide = ([t.double() for t in tensors] for tensors in (self.tensors, self.upstream))
        tensors, upstream = map(tuple, wide)
        return self._replace(tensors=tensors, upstream=upstream)


def _tuple(results) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def norm(dtype, device, rows: int, n: int, trained: bool = False) -> Case:
    x, dy = (torch.randn(rows, n, device=device).to(dtype) for _ in range(2))
    weight = (1 + torch.randn(n, device=device) / 4).to(dtype)
    count, size = rows * n, {"rows": rows, "n": n}
    return Case("rms_norm", size, (x, weight), 1 + trained, (dy,), (2 * count, 5 * count), (_EPS,))


def gated(dtype, device, rows: int, n: int, activation: str = "silu") -> Case:
    gate, up, dy = (torch.randn(rows, n, device=device).to(dtype) for _ in range(3))
    count, size = rows * n, {"rows": rows, "n": n}
    moved = 3 * count, 8 * count
    return Case("gated_activation", size, (gate, up), 2, (dy,), moved, (activation,))


def rotary(dtype, device, batch: int, q: int, k: int, positions: int, head: int) -> Case:
    """Heads as their projections write them, gradients as attention does."""

    def heads(many: int) -> torch.Tensor:
        return torch.randn(batch, many, positions, head, device=device).to(dtype)

    projected = tuple(heads(h).transpose(1, 2).contiguous().transpose(1, 2) for h in (q, k))
    angles = torch.outer(
        torch.arange(positions, device=device), 1e4 ** -torch.linspace(0, 1, head // 2)
    )
    table = torch.cat((angles, angles), -1)[None]
    given = *projected, table.cos().to(dtype), table.sin().to(dtype)
    sizes = {"batch": batch, "q": q, "k": k, "positions": positions, "head": head}
    count = batch * (q + k) * positions * head
    upstream = heads(q), heads(k)
    return Case("rotary_embedding", sizes, given, 2, upstream, (2 * count, 4 * count))


def _composed_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _composed_gate(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return getattr(functional, activation)(gate) * up


def _composed_turn(q, k, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _swapped(q) * sin, k * cos + _swapped(k) * sin


def _swapped(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


_COMPOSED = {
    "rms_norm": _composed_norm,
    "gated_activation": _composed_gate,
    "rotary_embedding": _composed_turn,
}


def _by(op: str, impl: str) -> Function:
    function = getattr(artemis_kernels, op)
    return lambda *given: function(*given, impl=impl)


def judged(case: Case) -> Verdict:
    """The largest error over its limit, of results and gradients, against the formula in fp64."""
    found, truth = (
        given.trained(_by(case.op, impl))
        for given, impl in ((case, "triton"), (case.double(), "reference"))
    )
    worst = 0.0
    for one, true in zip(found, truth, strict=True):
        if not torch.isfinite(one).all():
            return Verdict(None, "not finite")
        limits = torch.finfo(one.dtype).eps / 2 * true.abs() + _FP16_STEP
        limits = limits + _RELATIVE * true.abs().amax(-1, keepdim=True)
        worst = max(worst, ((one.double() - true).abs() / limits).max().item())
    return Verdict(worst, "results and gradients")


def check(device: torch.device, tiny: bool) -> Iterator[Row]:
    """Rows of the section on accuracy: one for every case and dtype."""
    low = (torch.float16,) if tiny else (torch.bfloat16, torch.float16)
    for dtype in (*low, torch.float32):
        for case in _hard(dtype, device, tiny):
            about = {
                "kind": "accuracy", "op": case.op, "strategy": "rows", "sizes": case.sizes,
                "dtype": str(dtype).removeprefix("torch."), "dropout": 0.0,
            }  # fmt: skip
            try:
                yield about | judged(case).to_dict()
            except FAILURES as error:
                yield about | {"ratio": None} | failure(error)


def _hard(dtype: torch.dtype, device: torch.device, tiny: bool) -> Iterator[Case]:
    torch.manual_seed(0)
    where = dtype, device
    norms = ((17, 33),) if tiny else ((256, 4096), (600, 128), (65, 4097), (3, 20000))
    yield from (norm(*where, *size, trained=True) for size in norms)
    for activation in ("silu", "gelu", "gelu_tanh", "relu", "identity")[: 1 if tiny else None]:
        yield gated(*where, 33, 65 if tiny else 1025, activation)
    few, many = (2, 3, 1, 5, 48), (2, 32, 8, 65, 128)
    heads = (few,) if tiny else (many, few, (1, 3, 1, 5, 80), (1, 8, 8, 3, 2))
    yield from (rotary(*where, *size) for size in heads)


def between(device: torch.device, tiny: bool, rounds: int) -> Iterator[Row]:
    """The copy's bandwidth, then a row for every case, pass and provider, of Llama 2 7B."""
    timer = Timer(device, rounds)
    gbs = copy(device, timer.best)
    yield {"kind": "bandwidth", "gbs": gbs}
    where = torch.float32 if tiny else torch.bfloat16, device
    rows, n, hidden = (8, 32, 48) if tiny else (8192, 4096, 11008)
    heads = (2, 4, 4, 4, 8) if tiny else (8, 32, 32, 1024, 128)
    for op, make, what, sizes in (
        ("rms_norm", norm, "weight frozen", (rows, n)),
        ("rms_norm", norm, "weight trained", (rows, n, True)),
        ("gated_activation", gated, "silu", (rows, hidden)),
        ("rotary_embedding", rotary, "q and k", heads),
    ):
        about = {"kind": "between", "op": op, "what": what}
        found = _measured(partial(make, *where), sizes, timer, gbs)
        yield from contained((about | row for row in found), about)


def _measured(
    make: Callable[..., Case], sizes: tuple[int, ...], timer: Timer, gbs: float
) -> Iterator[Row]:
    """A row for either pass and provider; `over_torch` is torch's time over its own."""
    torch.manual_seed(0)
    case = make(*sizes)
    try:
        few = min(sizes[0], _JUDGED_ROWS) if case.op != "rotary_embedding" else 1
        verdict = judged(make(few, *sizes[1:])).to_dict()
    except FAILURES as error:
        verdict = {"ratio": None} | failure(error)
    verdict["error"] = verdict.pop("ratio")
    runs = {"torch": _COMPOSED[case.op], "artemis": _by(case.op, "triton")}
    for which, elements in zip(("forward", "both"), case.elements, strict=True):
        rows: dict[str, Row] = {"torch": {}, "artemis": dict(verdict)}
        of_pass = case.run if which == "forward" else case.trained
        calls = {
            name: lambda run=run, of_pass=of_pass: of_pass(run)
            for name, run in runs.items()
            if rows[name].get("passed", True)
        }
        for name, times in timer.rows(tried(calls, rows)).items():
            rows[name] |= times
        moved = elements * case.tensors[0].element_size()
        for name, row in rows.items():
            if "ms" in row:
                row["gbs"] = moved / row["ms"]["p50"] / 1e6
                row["of_copy"] = row["gbs"] / gbs
                if "ms" in rows["torch"]:
                    row["over_torch"] = rows["torch"]["ms"]["p50"] / row["ms"]["p50"]
            size = "×".join(map(str, case.sizes.values()))
            yield {"size": size, "pass": which, "provider": name} | row
