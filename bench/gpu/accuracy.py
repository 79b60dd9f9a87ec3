"""Every strategy of every operation against the fp64 reference: what `bench.gpu` proves first.

Each has a process of its own: kernels compile side by side, and one that breaks the context of its
GPU spoils no other. A strategy is forced through the torch operator below the public function, so
that each is held to each shape whatever the cost model prefers.
"""

from collections.abc import Iterator
from typing import Any

import torch

from artemis.benchmark.operations import (
    SEED,
    Operation,
    Sizes,
    Tensors,
    Truth,
    Verdict,
    operands,
)  # fmt: skip

from .failures import FAILURES, failure

STRATEGIES = {
    "lora_linear": ("one_pass", "split", "vendor"),
    "adapter_linear": ("folded", "folded_vendor", "plain"),
    "bottleneck_adapter": ("row_block", "two_launch", "two_launch_one_read"),
}
_ORDER = {  # of the torch operators' tensors
    "lora_linear": ("x", "weight", "lora_a", "lora_b", "bias"),
    "adapter_linear": ("x", "weight", "down", "up", "bias", "bias_down", "bias_up"),
    "bottleneck_adapter": ("x", "down", "up", "bias_down", "bias_up", "residual"),
}
BALANCED = Sizes(512, 1024, 768, 16)
HARD = (
    Sizes(17, 64, 48, 8),  # a dot needs a rank of 16: half is padding
    Sizes(129, 127, 257, 12),  # odd sizes, one past whole tiles
    Sizes(1, 33, 17, 1),
    Sizes(15, 40, 24, 3),  # below a block everywhere
    Sizes(127, 1025, 130, 64),
    Sizes(0, 64, 48, 8),
)


def forced(
    operation: Operation,
    strategy: str,
    tensors: Tensors,
    dropout_p: float = 0.0,
    activation: str = "gelu",
) -> torch.Tensor:
    """The operation by one strategy of its Triton kernels, with the mask of SEED."""
    x = tensors["x"]
    seed = torch.full((1,), SEED, device=x.device) if dropout_p else None
    options = (activation,) if operation.activated else ()
    return getattr(torch.ops.artemis, operation.name)(
        *(tensors.get(name) for name in _ORDER[operation.name]), 1.0, tensors.get("scale"),
        *options, dropout_p, seed, "triton", strategy,
    )  # fmt: skip


def cases(operation: Operation, tiny: bool) -> Iterator[dict[str, Any]]:
    """Sizes, dropout, activation and whether only the branch counts: most important first."""
    balanced, hard = (Sizes(33, 40, 36, 8), HARD[:1]) if tiny else (BALANCED, HARD)
    for dropout in (0.0, 0.1):
        yield {"sizes": balanced, "dropout": dropout}
    yield {"sizes": balanced, "dropout": 0.0, "branch_only": True}
    for sizes in hard:
        yield {"sizes": sizes, "dropout": 0.0}
    for sizes in hard[1:3]:
        yield {"sizes": sizes, "dropout": 0.1}
    if operation.activated and not tiny:
        for activation in ("silu", "gelu_tanh", "identity"):
            yield {"sizes": balanced, "dropout": 0.0, "activation": activation}


def check(
    operation: Operation, strategy: str, device: torch.device, tiny: bool
) -> Iterator[dict[str, Any]]:
    """A row for every case and dtype."""
    dtypes = (torch.float32, torch.float16) if tiny else (torch.bfloat16, torch.float16)
    for case in cases(operation, tiny):
        for dtype in dtypes[:1] if tiny and case.get("branch_only") else dtypes:
            if strategy == "one_pass" and case["dropout"]:
                continue  # it has no dropout, and is never chosen with it
            row = {
                "kind": "accuracy", "op": operation.name, "strategy": strategy,
                "dtype": str(dtype).removeprefix("torch."), **case,
                "sizes": case["sizes"]._asdict(),
            }  # fmt: skip
            try:
                verdict = _judged(operation, strategy, case, dtype, device).to_dict()
            except FAILURES as error:
                verdict = {"ratio": None} | failure(error)
            yield row | verdict


def _judged(
    operation: Operation,
    strategy: str,
    case: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> Verdict:
    torch.manual_seed(0)
    tensors = operands(operation, case["sizes"], dtype, device)
    if case.get("branch_only"):  # a small term hides behind the rounding of a large one
        for name in ("weight", "residual"):
            if name in tensors and operation.name != "adapter_linear":
                tensors[name] = torch.zeros_like(tensors[name])
    options = {"dropout_p": case["dropout"]}
    if operation.activated:
        options["activation"] = case.get("activation", "gelu")
    truth = Truth(operation, tensors, operation.trained, **options)
    return truth.judge(lambda given: forced(operation, strategy, given, **options))
