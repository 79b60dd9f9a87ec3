"""Shared helpers: the accuracy rule, hard shapes, hostile layouts, guard bands.

An operation is run on named tensors (`{"x": ..., "lora_a": ...}`) as keyword arguments; `outcome`
gives its result and gradients by the same names and sees to it that no input was written to.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch

Tensors = dict[str, torch.Tensor]


class Sizes(NamedTuple):
    """Rows, in features, out features, rank or width."""

    m: int
    k: int
    n: int
    r: int


# Shapes that break kernels. Interpreted tiles are 32 wide, so 33 and 65 leave a last tile of one.
HARD_SHAPES = [
    pytest.param(Sizes(0, 8, 6, 3), id="no-rows"),
    pytest.param(Sizes(1, 33, 17, 1), id="one-row-rank-1"),
    pytest.param(Sizes(2, 1, 1, 1), id="one-feature"),  # every dimension below a block
    pytest.param(Sizes(15, 40, 24, 3), id="below-a-block"),
    pytest.param(Sizes(17, 64, 48, 8), id="rank-8-padded"),  # a dot needs 16: half is padding
    pytest.param(Sizes(64, 64, 32, 16), id="whole-tiles"),  # no mask may be needed
    pytest.param(Sizes(65, 65, 33, 12), id="one-past-a-tile"),  # each last tile holds one
    pytest.param(Sizes(33, 31, 45, 48), id="rank-above-sizes"),  # wider than in and out
    pytest.param(Sizes(127, 35, 70, 64), id="odd-in"),  # odd columns: no paired hash
    pytest.param(Sizes(129, 130, 20, 5), id="many-tiles"),  # split sums with a ragged last part
]
SIZES = Sizes(33, 40, 36, 8)  # where the shape is not the question

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "identity")


def operands(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Tensors:
    """Normal tensors of `shapes`; matrices are scaled so that every product has unit variance.

    The terms of an operation are balanced then: an error in a small one cannot hide behind the
    rounding of a large one.
    """
    return {
        name: (
            torch.randn(shape) / (1 if name in ("x", "residual") else math.sqrt(_fan_in(shape)))
        ).to(dtype)
        for name, shape in shapes.items()
    }


def _fan_in(shape: tuple[int, ...]) -> int:
    return max(shape[-1], 1) if len(shape) > 1 else 1


def outcome(
    op: Callable[..., torch.Tensor],
    tensors: Tensors,
    wanted: Iterable[str] = (),
    dy: torch.Tensor | None = None,
    **options,
) -> Tensors:
    """`y` of `op(**tensors, **options)`, and the gradients of `wanted` for the upstream `dy`.

    The tensors keep their layout and are left as they were, which is asserted.
    """
    wanted = set(wanted)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    leaves = {
        name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()
    }
    y = op(**leaves, **options)
    results = {"y": y.detach()}
    if wanted:
        y.backward(torch.ones_like(y) if dy is None else dy.to(y.dtype))
        results |= {name: leaves[name].grad for name in sorted(wanted)}
    for name, tensor in tensors.items():
        assert_same_bits(tensor, before[name], f"{name}, an input")
        assert name in wanted or leaves[name].grad is None, f"{name} got a gradient nobody wants"
    return results


def in_dtype(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """The same values in another dtype."""
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def upstream(y: torch.Tensor) -> torch.Tensor:
    """A gradient for `y` that is half noise, half y: no sum over it cancels to rounding noise."""
    rms = _rms(y) if y.numel() else 1.0
    return (y / (rms or 1.0) + torch.randn_like(y)) / math.sqrt(2)


def logits_gradient(rows: int, words: int, spread: float, dtype=torch.float32) -> torch.Tensor:
    """Of a mean cross entropy: p − 1 at a target drawn from p, and p elsewhere."""
    p = torch.softmax(spread * torch.randn(rows, words), 1)
    target = torch.multinomial(p, 1)
    return (p.scatter_add(1, target, -torch.ones(rows, 1)) / rows).to(dtype)


def assert_follows_reference(
    op: Callable[..., torch.Tensor],
    reference: Callable[..., torch.Tensor],
    tensors: Tensors,
    wanted: Iterable[str],
    *,
    c: float,
    **options,
) -> None:
    """Hold `op` to the accuracy rule against `reference`, for y and every gradient in `wanted`.

    `reference` runs twice: in fp64, the truth, and in the dtype of the tensors, the yardstick.
    """
    wanted = list(wanted)
    doubles = in_dtype(tensors, torch.float64)
    dy = upstream(outcome(reference, doubles, **options)["y"]).to(tensors["x"].dtype)
    truth = outcome(reference, doubles, wanted, dy, **options)
    plain = outcome(reference, tensors, wanted, dy, **options)
    actual = outcome(op, tensors, wanted, dy, **options)
    for name, y64 in truth.items():
        assert actual[name].dtype == plain[name].dtype, f"{name}: {actual[name].dtype}"
        assert_accurate(actual[name], y64, plain[name], dy.dtype, c=c, name=name)


def assert_accurate(
    y: torch.Tensor,
    y64: torch.Tensor,
    y_eager: torch.Tensor,
    dtype: torch.dtype,
    *,
    c: float,
    name: str = "y",
) -> None:
    """`rms(y - y64) <= c·rms(y_eager - y64) + u·rms(y64)/4`, and the maximum likewise with 2c.

    `u` is the eps of `dtype`, the one computed in (or y's, if coarser), `y_eager` plain torch in
    it, `y64` the fp64 truth. c is 1 where intermediates stay in fp32 and 1.25 where one is rounded.
    The rule compares statistics: over few elements both sides are themselves noise (plain torch
    may hit a scalar's truth by luck), so they get slack that falls with the count.
    """
    assert y.shape == y64.shape, f"{name}: shape {tuple(y.shape)}, wanted {tuple(y64.shape)}"
    if not y.numel():
        return
    assert torch.isfinite(y64).all() and torch.isfinite(y).all(), f"{name} is not finite"
    u = max(torch.finfo(y.dtype).eps, torch.finfo(dtype).eps)
    slack, few = 1 + 3 / math.sqrt(y.numel()), 2 / y.numel()
    error, plain = y.double() - y64, y_eager.double() - y64
    for measure, statistic, limit in (
        ("rms", _rms(error), c * _rms(plain) + u * _rms(y64) * (0.25 + few)),
        ("max", _max(error), 2 * c * _max(plain) + u * _max(y64) * (1 + few)),
    ):
        assert statistic <= slack * limit, (
            f"{name}: {measure} error {statistic:.3g}, allowed {slack * limit:.3g}"
            f" (plain torch: {(_rms if measure == 'rms' else _max)(plain):.3g})"
        )


def _rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def _max(x: torch.Tensor) -> float:
    return x.abs().max().item()


def assert_same_bits(actual: torch.Tensor, wanted: torch.Tensor, name: str = "y") -> None:
    """Equal in every bit, nan included (equal nan and equal sign of zero)."""
    assert actual.shape == wanted.shape and actual.dtype == wanted.dtype, name
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    same = actual.contiguous().view(bits) == wanted.contiguous().view(bits)
    assert same.all(), f"{name}: {(~same).sum()} of {same.numel()} elements differ"


def assert_same_outcome(actual: Tensors, wanted: Tensors) -> None:
    """`assert_same_bits` for a result and its gradients."""
    assert actual.keys() == wanted.keys()
    for name in wanted:
        assert_same_bits(actual[name], wanted[name], name)


def subsets(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Every non-empty subset: all the ways in which arguments can require gradients."""
    names = tuple(names)
    sizes = range(1, len(names) + 1)
    return [chosen for size in sizes for chosen in itertools.combinations(names, size)]


def transposed(t: torch.Tensor) -> torch.Tensor:
    """Column-major: what GPT-2's Conv1D and a fused qkv hand over."""
    return t.mT.contiguous().mT


def sliced(t: torch.Tensor) -> torch.Tensor:
    """Every other column of a wider buffer whose other columns are nan."""
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), math.nan)
    wide[..., ::2] = t
    return wide[..., ::2]


def offset(t: torch.Tensor) -> torch.Tensor:
    """One element into its storage: no vector load is aligned. Nan before and after."""
    buffer = t.new_full((t.numel() + 2,), math.nan)
    buffer[1:-1] = t.reshape(-1)
    return buffer[1:-1].view(t.shape)


LAYOUTS = [transposed, sliced, offset]


class GuardedAllocations:
    """Replaces torch's uninitialised allocations: nan inside, a guard band on either side.

    The interpreter writes out of bounds without a word; a band shows it. Poison shows an element
    that a kernel was to write and did not. Only what Python code allocates is covered: kernels'
    outputs, not what torch allocates inside its own operations.
    """

    BAND = 64
    SENTINEL = 77  # exact in every dtype

    def __init__(self):
        self._buffers: list[tuple[torch.Tensor, int]] = []
        self._full = torch.full

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Patch `torch.empty`, `torch.empty_like` and `Tensor.new_empty`."""

        def empty(*size, dtype=None, device=None, **_):
            return self._allocate(_shape(size), dtype or torch.get_default_dtype(), device)

        def empty_like(like, *, dtype=None, **_):
            return self._allocate(like.shape, dtype or like.dtype, like.device)

        def new_empty(like, *size, dtype=None, **_):
            return self._allocate(_shape(size), dtype or like.dtype, like.device)

        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(torch, "empty_like", empty_like)
        monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)

    def _allocate(self, shape, dtype, device) -> torch.Tensor:
        count = math.prod(shape)
        buffer = self._full((count + 2 * self.BAND,), self.SENTINEL, dtype=dtype, device=device)
        body = buffer[self.BAND : self.BAND + count]
        if dtype.is_floating_point:
            body.fill_(math.nan)
        self._buffers.append((buffer, count))
        return body.view(shape)

    def assert_untouched(self) -> None:
        """Every guard band still holds what it was filled with."""
        for buffer, count in self._buffers:
            bands = torch.cat((buffer[: self.BAND], buffer[self.BAND + count :]))
            assert (bands == self.SENTINEL).all(), "a kernel wrote out of bounds"


def _shape(size: tuple) -> tuple[int, ...]:
    return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)
