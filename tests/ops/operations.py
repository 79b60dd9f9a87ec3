"""The three operations as the tests see them: operands, paths, and the path forced.

A public function chooses implementation and strategy; the torch operator below it takes both as
arguments, so a test can hold every strategy to the same shapes whatever the cost model prefers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import artemis_kernels
from artemis_kernels.core.device import why_no_triton
from tests import kit
from tests.kit import Sizes

SINGLE, BF16, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
BLOCKER = why_no_triton(torch.device("cpu"))
#: Marks tests that run kernels on CPU tensors, which only Triton's interpreter does.
INTERPRETED = pytest.mark.skipif(BLOCKER is not None, reason=f"needs the interpreter: {BLOCKER}")


@dataclass(frozen=True)
class Path:
    """One way to compute an operation, the dtype it is tried in, and the accuracy rule's c."""

    impl: str
    strategy: str
    dtype: torch.dtype
    c: float = 1.25

    def __str__(self) -> str:
        return f"{self.impl}-{self.strategy}-{str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Operation:
    """A public operation, what its arguments look like, and the strategies it can take.

    `masked` names the size whose columns dropout acts on: "k" for x itself, "r" for the units.
    """

    name: str
    forced: Callable[..., torch.Tensor]  # (impl, strategy, **tensors, **options) -> y
    shapes: Callable[[Sizes], dict[str, tuple[int, ...]]]
    eager: tuple[str, ...]
    triton: tuple[str, ...]
    trained: tuple[str, ...]
    masked: str

    def __str__(self) -> str:
        return self.name

    @property
    def public(self) -> Callable[..., torch.Tensor]:
        return getattr(artemis_kernels, self.name)

    def reference(self, **arguments) -> torch.Tensor:
        """The operation's meaning."""
        return self.public(impl="reference", **{"scale": 1.0} | arguments)

    def explained(self, **arguments) -> artemis_kernels.Choice:
        return artemis_kernels.explain(self.name, **arguments)

    def along(self, path: Path) -> Callable[..., torch.Tensor]:
        """The operation with implementation and strategy given, its own choice set aside."""
        return lambda **arguments: self.forced(path.impl, path.strategy, **arguments)

    def operands(self, sizes: Sizes, dtype: torch.dtype, *, without=()) -> kit.Tensors:
        """Every tensor argument by name, the terms balanced, the scale a 0-d tensor."""
        shapes = {name: s for name, s in self.shapes(sizes).items() if name not in without}
        tensors = kit.operands(shapes, dtype)
        if "scale" not in without:
            tensors["scale"] = torch.tensor(0.75, dtype=dtype)
        return tensors

    def paths(self, *dtypes: torch.dtype) -> list:
        """Parameters for every strategy in every dtype it can be tried in on a CPU (or `dtypes`).

        The interpreter's bf16 products are wrong in silence, so kernels are held to fp32 and fp16.
        """
        eager, kernels = dtypes or (SINGLE, BF16, HALF), dtypes or (SINGLE, HALF)
        every = [Path("eager", s, dtype) for s in self.eager for dtype in eager]
        if BLOCKER is None:
            every += [Path("triton", s, dtype) for s in self.triton for dtype in kernels]
        return [pytest.param(path, id=str(path)) for path in every]


def lora_linear(
    impl, strategy, x, weight, lora_a, lora_b, scale=1.0, *, bias=None, dropout_p=0.0, seed=None
):
    y = torch.ops.artemis.lora_linear(
        _rows(x), weight, lora_a, lora_b, bias, *_scale(scale), dropout_p, _seed(seed, x), impl,
        strategy,
    )  # fmt: skip
    return y.view(*x.shape[:-1], weight.shape[0])


def adapter_linear(
    impl, strategy, x, weight, down, up, *, bias=None, bias_down=None, bias_up=None,
    activation="gelu", dropout_p=0.0, seed=None, scale=1.0,
):  # fmt: skip
    y = torch.ops.artemis.adapter_linear(
        _rows(x), weight, down, up, bias, bias_down, bias_up, *_scale(scale), activation,
        dropout_p, _seed(seed, x), impl, strategy,
    )  # fmt: skip
    return y.view(*x.shape[:-1], weight.shape[0])


def bottleneck_adapter(
    impl, strategy, x, down, up, *, bias_down=None, bias_up=None, activation="gelu", dropout_p=0.0,
    seed=None, scale=1.0, residual=None,
):  # fmt: skip
    y = torch.ops.artemis.bottleneck_adapter(
        _rows(x), down, up, bias_down, bias_up, None if residual is None else _rows(residual),
        *_scale(scale), activation, dropout_p, _seed(seed, x), impl, strategy,
    )  # fmt: skip
    return y.view(x.shape)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _scale(scale: float | torch.Tensor | tuple) -> tuple[float, torch.Tensor | None]:
    if isinstance(scale, tuple):
        return scale
    return (1.0, scale) if isinstance(scale, torch.Tensor) else (float(scale), None)


def _seed(seed: int | torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    return torch.tensor([seed], device=x.device) if isinstance(seed, int) else seed


LORA = Operation(
    "lora_linear",
    lora_linear,
    lambda s: {
        "x": (s.m, s.k), "weight": (s.n, s.k), "lora_a": (s.r, s.k), "lora_b": (s.n, s.r),
        "bias": (s.n,),
    },
    eager=("addmm",),
    triton=("one_pass", "split", "vendor"),
    trained=("x", "lora_a", "lora_b", "bias", "scale"),
    masked="k",
)  # fmt: skip
ADAPTER = Operation(
    "adapter_linear",
    adapter_linear,
    lambda s: {
        "x": (s.m, s.k), "weight": (s.n, s.k), "down": (s.r, s.n), "up": (s.n, s.r),
        "bias": (s.n,), "bias_down": (s.r,), "bias_up": (s.n,),
    },
    eager=("folded", "plain"),
    triton=("folded", "folded_vendor", "plain"),
    trained=("x", "down", "up", "bias", "bias_down", "bias_up", "scale"),
    masked="r",
)  # fmt: skip
BOTTLENECK = Operation(
    "bottleneck_adapter",
    bottleneck_adapter,
    lambda s: {
        "x": (s.m, s.k), "down": (s.r, s.k), "up": (s.k, s.r), "bias_down": (s.r,),
        "bias_up": (s.k,), "residual": (s.m, s.k),
    },
    eager=("addmm",),
    triton=("row_block", "two_launch", "two_launch_one_read"),
    trained=("x", "down", "up", "bias_down", "bias_up", "residual", "scale"),
    masked="r",
)  # fmt: skip
OPERATIONS = (LORA, ADAPTER, BOTTLENECK)


def every_path(*dtypes: torch.dtype) -> list:
    """Parameters (operation, path) over all operations."""
    return [
        pytest.param(operation, path.values[0], id=f"{operation.name}-{path.id}")
        for operation in OPERATIONS
        for path in operation.paths(*dtypes)
    ]


def follow_reference(
    operation: Operation, path: Path, tensors: kit.Tensors, wanted=None, **options
) -> None:
    """The accuracy rule for y and the gradients of `wanted` (all there are) along `path`."""
    if path.strategy == "one_pass" and options.get("dropout_p"):
        pytest.skip("one pass has no dropout, and is never chosen with it")
    if wanted is None:
        wanted = [name for name in operation.trained if name in tensors]
    kit.assert_follows_reference(
        operation.along(path), operation.reference, tensors, wanted, c=path.c, **options
    )


def away_from_the_bend(tensors: kit.Tensors, activation: str) -> kit.Tensors:
    """Operands whose units stay clear of relu's bend in 16 bits, half on and half off.

    There a rounding error decides between slopes 0 and 1: one crossing outweighs every other
    error, and whether it happens is luck. In fp32 crossings are too rare to matter.
    """
    if activation != "relu" or tensors["x"].dtype == SINGLE:
        return tensors
    signs = torch.ones_like(tensors["bias_down"])
    signs[::2] = -1
    return tensors | {"bias_down": 8 * signs}
