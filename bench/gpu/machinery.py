"""What else only a GPU shows, a case each: torch's machinery round the operators, fp32, a head.

Inductor compiles round an operator; two runs give the same bits; a CUDA graph draws a fresh mask at
each replay; training by graphs is training without; the kernels' fp32; dX of a head held in int8;
what stands between a transformer's products.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import artemis_kernels
from artemis.benchmark.operations import (
    OPERATIONS,
    SEED,
    Operation,
    Sizes,
    Tensors,
    Truth,
    Verdict,
    operands,
    outcome,
    relative_error,
)
from artemis.benchmark.timer import captured
from artemis_kernels import QuantizedWeight

from . import between, trained
from .accuracy import BALANCED, forced
from .failures import FAILURES, failure

_DROPOUT = 0.1
_FP32 = {"lora_linear": "split", "adapter_linear": "folded", "bottleneck_adapter": "row_block"}
_HEAD_LIMIT = 0.03  # relative, of dX
Judge = Callable[[Operation, Tensors], Verdict]


def check(name: str, device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    """The rows of one of CASES."""
    return CASES[name](device, tiny)


def _of_each(
    judge: Judge, what: str, device: torch.device, tiny: bool, dtype: torch.dtype = torch.bfloat16
) -> Iterator[dict[str, Any]]:
    """A row for every operation."""
    sizes, dtype = (Sizes(33, 40, 36, 8), torch.float32) if tiny else (BALANCED, dtype)
    for operation in OPERATIONS:
        torch.manual_seed(0)
        about = _about(operation.name, what, dtype, sizes, _DROPOUT)
        yield about | _tried(lambda op=operation: judge(op, operands(op, sizes, dtype, device)))


def _about(op: str, what: str, dtype: torch.dtype, sizes: Sizes, dropout: float) -> dict[str, Any]:
    return {
        "kind": "accuracy", "op": op, "strategy": what, "sizes": sizes._asdict(),
        "dtype": str(dtype).removeprefix("torch."), "dropout": dropout,
    }  # fmt: skip


def _tried(judged: Callable[[], Verdict]) -> dict[str, Any]:
    try:
        return judged().to_dict()
    except FAILURES as error:
        return {"ratio": None} | failure(error)


def _public(operation: Operation, given: Tensors) -> torch.Tensor:
    return operation.public(given, dropout_p=_DROPOUT, seed=SEED, impl="triton")


def _compiled(operation: Operation, tensors: Tensors) -> Verdict:
    run = torch.compile(partial(_public, operation), fullgraph=True, dynamic=False)
    return Truth(operation, tensors, operation.trained, dropout_p=_DROPOUT).judge(run)


def _same_bits(operation: Operation, tensors: Tensors) -> Verdict:
    dy = torch.randn_like(operation.public(tensors, impl="reference"))
    first, second = (
        outcome(partial(_public, operation), tensors, operation.trained, dy) for _ in range(2)
    )
    differ = [name for name in first if not torch.equal(first[name], second[name])]
    return Verdict(None, f"{', '.join(differ)} differ") if differ else Verdict(0.0, "equal")


def _fp32(operation: Operation, tensors: Tensors) -> Verdict:
    strategy = _FP32[operation.name]
    truth = Truth(operation, tensors, operation.trained, dropout_p=_DROPOUT)
    return truth.judge(lambda given: forced(operation, strategy, given, _DROPOUT))


def _masks(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    about = _about(
        "lora_linear", "fresh masks of a graph", torch.float32, Sizes(65, 34, 34, 34), 0.5
    )
    yield about | _tried(lambda: _fresh_masks(device))


def _fresh_masks(device: torch.device) -> Verdict:
    """The masks of two replays, which y and dX of identities show where they are not zero."""
    x, eye = torch.ones(65, 34, device=device, requires_grad=True), torch.eye(34, device=device)
    seen: dict[str, torch.Tensor] = {}

    def draw() -> None:
        y = artemis_kernels.lora_linear(
            x, torch.zeros_like(eye), eye, eye, 1.0, dropout_p=0.5, impl="triton"
        )
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        seen.update(y=y.detach(), dx=dx)

    replay = captured(draw) if device.type == "cuda" else draw
    if replay is None:
        return Verdict(None, "no graph of it can be captured")
    masks = []
    for _ in range(2):
        replay()
        masks.append(seen["y"] != 0)
        if not torch.equal(masks[-1], seen["dx"] != 0):
            return Verdict(None, "the backward's mask is another than the forward's")
    return Verdict(None, "two equal masks") if torch.equal(*masks) else Verdict(0.0, "masks differ")


def _head(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    rows, inner, classes = (24, 32, 160) if tiny else (512, 1024, 32000)
    dtype = torch.float32 if tiny else torch.bfloat16
    about = _about(
        "quantized_linear", "dX of an int8 head", dtype, Sizes(rows, inner, classes, 0), 0.0
    )
    yield about | _tried(lambda: _dx_of_a_head(rows, inner, classes, dtype, device))


def _dx_of_a_head(
    rows: int, inner: int, classes: int, dtype: torch.dtype, device: torch.device
) -> Verdict:
    """dY is a loss's: small numbers that only count together, and one large one a row."""
    torch.manual_seed(0)
    head = torch.randn(classes, inner) + torch.randn(inner)
    weight = QuantizedWeight.quantize(head, activation_bits=8, makes_logits=True).to(device)
    x = torch.randn(rows, inner, device=device).to(dtype).requires_grad_()
    logits = 3 * torch.randn(rows, classes, device=device)
    dy = logits.softmax(-1)
    dy[torch.arange(rows), torch.randint(classes, (rows,))] -= 1
    dy = dy.to(dtype)
    y = artemis_kernels.quantized_linear(x, weight, impl="triton")
    (dx,) = torch.autograd.grad(y, x, dy)
    strategy = artemis_kernels.explain("quantized_linear", x, weight, impl="triton").strategy
    error = relative_error(dx, dy.double() @ weight.dequantize(torch.float64))
    return Verdict(error / _HEAD_LIMIT, strategy)


def _training(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    dtype = torch.float32 if tiny else torch.bfloat16
    about = _about("training", "as CUDA graphs", dtype, trained.sizes(tiny), trained.DROPOUT)
    yield about | _tried(lambda: trained.judge(device, tiny))


def _as_they_are(device: torch.device, tiny: bool) -> Iterator[dict[str, Any]]:
    yield from _of_each(_same_bits, "two runs, bit by bit", device, tiny)
    yield from _of_each(_fp32, "fp32", device, tiny, torch.float32)
    yield from _masks(device, tiny)
    yield from _head(device, tiny)


#: Name -> its rows; each has a process.
CASES: dict[str, Callable[[torch.device, bool], Iterator[dict[str, Any]]]] = {
    "as they are": _as_they_are,
    "compiled": partial(_of_each, _compiled, "compiled by Inductor"),
    "trained": _training,
    "between": between.check,
}
