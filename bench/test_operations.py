"""Each operation beside its peers, forward and backward: `pytest bench --benchmark-only`.

Peers: plain torch with torch's own dropout, PEFT's LoRA layer, and the bare frozen product with its
dX, below which none can go. What is timed has first been compared with its reference.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional

from artemis_kernels import adapter_linear, bottleneck_adapter, lora_linear

ROWS, RANK, WIDTH, SCALE = 1024, 8, 64, 0.5


class Case(NamedTuple):
    """A linear layer of the Llama of hidden 512, and how it is trained."""

    in_features: int
    out_features: int
    dtype: torch.dtype
    dropout: float

    def __str__(self) -> str:
        size = f"{self.in_features}-{self.out_features}"
        return f"{size}-{str(self.dtype).removeprefix('torch.')}-dropout-{self.dropout}"


# q_proj and gate_proj; fp32 without dropout shows the products alone, bf16 with it the masks.
CASES = [
    Case(512, out_features, dtype, dropout)
    for out_features in (512, 1376)
    for dtype, dropout in ((torch.float32, 0.0), (torch.bfloat16, 0.1))
]


def bare(x, weight, *_, **options) -> torch.Tensor:
    """The frozen product alone."""
    return functional.linear(x, weight)


def fused_lora(x, weight, lora_a, lora_b, *, dropout_p: float) -> torch.Tensor:
    """The operation itself."""
    return lora_linear(x, weight, lora_a, lora_b, SCALE, dropout_p=dropout_p)


def plain_lora(x, weight, lora_a, lora_b, *, dropout_p: float) -> torch.Tensor:
    """LoRA as one would write it."""
    s = functional.linear(functional.dropout(x, dropout_p), lora_a.to(x.dtype))
    return functional.linear(x, weight) + SCALE * functional.linear(s, lora_b.to(x.dtype))


def plain_bottleneck(x, down, up, *, dropout_p: float) -> torch.Tensor:
    """A bottleneck as one would write it."""
    h = functional.gelu(functional.linear(x, down.to(x.dtype)))
    return x + functional.linear(functional.dropout(h, dropout_p), up.to(x.dtype))


def plain_adapter_linear(x, weight, down, up, *, dropout_p: float) -> torch.Tensor:
    """The same on a linear layer's output."""
    return plain_bottleneck(functional.linear(x, weight), down, up, dropout_p=dropout_p)


def peft_layer(weight, lora_a, lora_b, dropout_p: float) -> nn.Module:
    """PEFT's LoRA layer over the same weights, its adapter in their dtype."""
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    base.weight = nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(
        r=RANK, lora_alpha=SCALE * RANK, lora_dropout=dropout_p, target_modules=["0"]
    )
    layer = inject_adapter_in_model(config, nn.Sequential(base)).to(weight.dtype).train()
    with torch.no_grad():
        layer[0].lora_A["default"].weight.copy_(lora_a)
        layer[0].lora_B["default"].weight.copy_(lora_b)
    return layer


def operands(case: Case, *names: str) -> list[torch.Tensor]:
    """Tensors of unit-variance products: x and the weight in the case's dtype, the others fp32.

    All but the weight require a gradient.
    """
    k, n = case.in_features, case.out_features
    shapes = {
        "x": (ROWS, k), "weight": (n, k), "lora_a": (RANK, k), "lora_b": (n, RANK),
        "down": (WIDTH, n), "up": (n, WIDTH),
    }  # fmt: skip
    torch.manual_seed(0)
    tensors = []
    for name in names:
        tensor = torch.randn(shapes[name]) / (1 if name == "x" else shapes[name][1] ** 0.5)
        dtype = case.dtype if name in ("x", "weight") else torch.float32
        tensors.append(tensor.to(dtype).requires_grad_(name != "weight"))
    return tensors


def step(function: Callable[..., torch.Tensor], *tensors: torch.Tensor, **options):
    """A call that runs forward and backward once; gradients are dropped after it."""
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    if isinstance(function, nn.Module):
        leaves += [p for p in function.parameters() if p.requires_grad]
    dy = torch.randn_like(function(*tensors, **options))

    def run() -> None:
        function(*tensors, **options).backward(dy)
        for leaf in leaves:
            leaf.grad = None

    return run


def check(operation: Callable[..., torch.Tensor], *tensors: torch.Tensor, **options) -> None:
    """The output and all gradients agree with the reference's under one mask."""
    outcomes = []
    for impl in (None, "reference"):
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
        y = operation(*leaves, impl=impl, seed=1, **options)
        y.backward(torch.ones_like(y))
        outcomes.append([y.detach(), *(t.grad for t in leaves if t.requires_grad)])
    for found, expected in zip(*outcomes, strict=True):
        atol = 32 * torch.finfo(tensors[0].dtype).eps * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("provider", ["artemis", "plain", "peft", "bare"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lora_linear(benchmark, case: Case, provider: str):
    benchmark.group = f"lora_linear {case}"
    x, *weights = operands(case, "x", "weight", "lora_a", "lora_b")
    check(partial(lora_linear, scale=SCALE), x, *weights, dropout_p=case.dropout)
    if provider == "peft":
        benchmark(step(peft_layer(*weights, case.dropout), x))
        return
    function = {"artemis": fused_lora, "plain": plain_lora, "bare": bare}[provider]
    benchmark(step(function, x, *weights, dropout_p=case.dropout))


@pytest.mark.parametrize("provider", ["artemis", "plain", "bare"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_adapter_linear(benchmark, case: Case, provider: str):
    benchmark.group = f"adapter_linear {case}"
    tensors = operands(case, "x", "weight", "down", "up")
    check(adapter_linear, *tensors, dropout_p=case.dropout)
    function = {"artemis": adapter_linear, "plain": plain_adapter_linear, "bare": bare}[provider]
    benchmark(step(function, *tensors, dropout_p=case.dropout))


@pytest.mark.parametrize("provider", ["artemis", "plain"])
@pytest.mark.parametrize("case", CASES[:2], ids=str)  # a block's output: in = out
def test_bottleneck_adapter(benchmark, case: Case, provider: str):
    benchmark.group = f"bottleneck_adapter {case}"
    tensors = operands(case, "x", "down", "up")
    check(bottleneck_adapter, *tensors, dropout_p=case.dropout)
    function = {"artemis": bottleneck_adapter, "plain": plain_bottleneck}[provider]
    benchmark(step(function, *tensors, dropout_p=case.dropout))
