"""The public operations as a benchmark sees them: operands, results, and the rule that judges them.

Truth is the fp64 reference on the same low-precision operands, the yardstick plain torch in their
own dtype.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import artemis_kernels

Tensors = dict[str, torch.Tensor]

SEED = 7
_C = 1.25  # one intermediate is rounded to the operands' dtype


class Sizes(NamedTuple):
    """Rows, in features, out features, rank or width."""

    m: int
    k: int
    n: int
    r: int


@dataclass(frozen=True)
class Operation:
    """A public operation: its tensors, and which of them learn."""

    name: str
    shapes: Callable[[Sizes], dict[str, tuple[int, ...]]]
    trained: tuple[str, ...]
    activated: bool  # whether it has an activation

    def public(self, tensors: Tensors, **options) -> torch.Tensor:
        return getattr(artemis_kernels, self.name)(**{"scale": 1.0} | tensors, **options)


OPERATIONS = (
    Operation(
        "lora_linear",
        lambda s: {
            "x": (s.m, s.k), "weight": (s.n, s.k), "lora_a": (s.r, s.k), "lora_b": (s.n, s.r),
            "bias": (s.n,),
        },
        ("x", "lora_a", "lora_b", "bias", "scale"),
        activated=False,
    ),
    Operation(
        "adapter_linear",
        lambda s: {
            "x": (s.m, s.k), "weight": (s.n, s.k), "down": (s.r, s.n), "up": (s.n, s.r),
            "bias": (s.n,), "bias_down": (s.r,), "bias_up": (s.n,),
        },
        ("x", "down", "up", "bias", "bias_down", "bias_up", "scale"),
        activated=True,
    ),
    Operation(
        "bottleneck_adapter",
        lambda s: {
            "x": (s.m, s.k), "down": (s.r, s.k), "up": (s.k, s.r), "bias_down": (s.r,),
            "bias_up": (s.k,), "residual": (s.m, s.k),
        },
        ("x", "down", "up", "bias_down", "bias_up", "residual", "scale"),
        activated=True,
    ),
)  # fmt: skip


def operands(
    operation: Operation, sizes: Sizes, dtype: torch.dtype, device: torch.device
) -> Tensors:
    """Normal tensors whose products have unit variance (the terms balance); scale is 0-d.

    Its gradient, a sum over all of y, is beyond fp16's range: it is fp32 there.
    """
    tensors = {}
    for name, shape in operation.shapes(sizes).items():
        tensor = torch.randn(shape, device=device)
        if len(shape) == 2 and name not in ("x", "residual"):
            tensor /= math.sqrt(shape[1])
        tensors[name] = tensor.to(dtype)
    held = torch.float32 if dtype == torch.float16 else dtype
    return tensors | {"scale": torch.tensor(0.75, dtype=held, device=device)}


def outcome(
    run: Callable[[Tensors], torch.Tensor], tensors: Tensors, wanted: tuple[str, ...], dy=None
) -> Tensors:
    """`y`, and with `dy` the gradients of `wanted`, if any, by name."""
    leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in tensors.items()}
    y = run(leaves)
    results = {"y": y.detach()}
    if dy is not None and wanted:
        gradients = torch.autograd.grad(y, [leaves[name] for name in wanted], dy.to(y.dtype))
        results |= dict(zip(wanted, gradients, strict=True))
    return results


class Verdict(NamedTuple):
    """The largest error over its limit (None: not finite or of a wrong shape), and where it is."""

    ratio: float | None
    where: str

    @property
    def passed(self) -> bool:
        return self.ratio is not None and self.ratio <= 1.0

    def to_dict(self) -> dict[str, Any]:
        ratio = None if self.ratio is None else round(self.ratio, 3)
        return {"ratio": ratio, "where": self.where, "passed": self.passed}


class Truth:
    """An operation's fp64 outcome on given operands, and plain torch's in their own dtype."""

    def __init__(
        self, operation: Operation, tensors: Tensors, wanted: tuple[str, ...], **options
    ) -> None:
        def reference(given: Tensors) -> torch.Tensor:
            return operation.public(given, impl="reference", seed=SEED, **options)

        self.tensors, self.wanted = tensors, wanted
        doubles = {name: tensor.double() for name, tensor in tensors.items()}
        y = outcome(reference, doubles, ())["y"]
        # Half noise, half y: no sum over it cancels to rounding noise.
        size = _rms(y) or 1.0
        self.dy = ((y / size + torch.randn_like(y)) / math.sqrt(2)).to(tensors["x"].dtype)
        self.exact = outcome(reference, doubles, wanted, self.dy)
        self.plain = outcome(reference, tensors, wanted, self.dy)

    def judge(self, run: Callable[[Tensors], torch.Tensor]) -> Verdict:
        """The accuracy rule for y and every wanted gradient of `run`."""
        found = outcome(run, self.tensors, self.wanted, self.dy)
        eps = torch.finfo(self.dy.dtype).eps, self._of_sums
        verdicts = [
            verdict
            for name, exact in self.exact.items()
            for verdict in _verdicts(name, found[name], exact, self.plain[name], *eps)
        ]
        return max(verdicts, key=lambda v: math.inf if v.ratio is None else v.ratio)

    @property
    def _of_sums(self) -> float:
        """The relative error of the longest sum in fp32, one term after the other.

        A random walk: term i is rounded by up to eps/2 of a partial sum that grows as √i. Plain
        torch may do better, as it may cut a sum into parts.
        """
        longest = max(size for tensor in self.tensors.values() for size in (*tensor.shape, 1))
        return torch.finfo(torch.float32).eps * math.sqrt(longest / 24)


def _verdicts(
    name: str, found: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, eps: float,
    of_sums: float,
) -> Iterator[Verdict]:  # fmt: skip
    """`rms(y - y64) ≤ c·rms(y_plain - y64) + (eps/4 + of_sums)·rms(y64)`; the maximum with 2c.

    Over few elements both sides are themselves noise, so they get slack that falls with the count.
    """
    if found.shape != exact.shape or not found.isfinite().all():
        yield Verdict(None, f"{name}: {tuple(found.shape)}, not finite or not {exact.shape}")
        return
    if not exact.numel():
        yield Verdict(0.0, name)
        return
    slack, few = 1 + 3 / math.sqrt(exact.numel()), 2 / exact.numel()
    error, allowed = found.double() - exact, plain.double() - exact
    allowed = allowed.where(plain.isfinite(), 0.0)  # beyond a dtype's range it excuses nothing
    for measure, c, share in ((_rms, _C, 0.25 + few), (_max, 2 * _C, 1 + few)):
        limit = slack * (c * measure(allowed) + (eps * share + of_sums) * measure(exact))
        where, size = f"{name}, {measure.__name__[1:]}", measure(error)
        yield Verdict(size / limit if limit else None if size else 0.0, where)


def _rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def _max(x: torch.Tensor) -> float:
    return float(x.abs().max())


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    """`rms(y - y64) / rms(y64)`."""
    return _rms(y.double() - exact) / (_rms(exact) or 1.0)
