"""Groups of three unlike members, run with gradients; the single calls, and their truth in fp64."""

import pytest
import torch

from tests.kit import Sizes
from tests.ops.operations import ADAPTER, LORA, Operation

OUT, RANKS, IN = (48, 17, 32), (8, 3, 12), 64
NARROW = 16  # an x so narrow that the first and the last bottleneck are folded on a CPU
KEYS = {LORA: ("lora_a", "lora_b"), ADAPTER: ("down", "up")}
BIASES = {LORA: ("bias",), ADAPTER: ("bias", "bias_down", "bias_up")}
BOTH = pytest.mark.parametrize("operation", [LORA, ADAPTER], ids=str)


def members_of(
    operation: Operation, dtype: torch.dtype, rows: int = 40, features: int = IN
) -> tuple:
    """x and the tensors of three members; the second has no biases and a float for scale."""
    members = [
        operation.operands(Sizes(rows, features, n, r), dtype)
        for n, r in zip(OUT, RANKS, strict=True)
    ]
    x = members[0]["x"]
    for member in members:
        del member["x"]
    members[1] |= dict.fromkeys(BIASES[operation]) | {"scale": 0.5}
    return x, members


def single_calls(operation, x, members, **options):
    return tuple(operation.public(x, **member, **options) for member in members)


def outcome(run, operation, x, members, dys, frozen=(), **options):
    """Every y, and gradients of x and all members; None in `dys` leaves an output out."""
    x = x.detach().requires_grad_("x" not in frozen)
    leaves = [
        {
            name: t.detach().requires_grad_(name not in ("weight", *frozen))
            if isinstance(t, torch.Tensor) else t
            for name, t in member.items()
        }
        for member in members
    ]  # fmt: skip
    ys = run(operation, x, leaves, **options)
    torch.autograd.backward(
        [y for y, dy in zip(ys, dys, strict=True) if dy is not None],
        [dy for dy in dys if dy is not None],
    )
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)} | {"x": x.grad}
    for i, member in enumerate(leaves):
        for name, t in member.items():
            if isinstance(t, torch.Tensor) and t.requires_grad:
                found[f"{name}{i}"] = t.grad
    return found


def truth(operation, x, members, dys, **options):
    """`outcome` of the single calls' meaning in fp64."""
    doubles = [
        {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in member.items()}
        for member in members
    ]
    dys = [dy.double() for dy in dys]
    return outcome(single_calls, operation, x.double(), doubles, dys, impl="reference", **options)


def gradients_like(members, dtype, rows: int = 40):
    return [torch.randn(rows, member["weight"].shape[0]).to(dtype) for member in members]


def assert_close(actual, wanted, rtol):
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        if value is None:  # a compiled backward gives zeros
            assert actual[name] is None or not actual[name].any(), name
        else:
            error = (actual[name] - value).norm() / value.norm().clamp(min=1e-12)
            assert error < rtol, f"{name}: {error:.2g}"
