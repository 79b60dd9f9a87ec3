"""What an operation is compared with: plain torch, `addmm` by hand, PEFT's layer, the bare product.

The bare product of the frozen layer is no peer but what none can go below.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from .operations import Operation, Sizes, Tensors

HAS_PEFT = importlib.util.find_spec("peft") is not None
Run = Callable[[Tensors], torch.Tensor]


def plain(operation: Operation, dropout: float) -> Run:
    """The operation as one would write it."""

    def lora(t: Tensors) -> torch.Tensor:
        s = functional.linear(functional.dropout(t["x"], dropout), t["lora_a"])
        return functional.linear(t["x"], t["weight"]) + functional.linear(s, t["lora_b"])

    def bottleneck(t: Tensors) -> torch.Tensor:
        y = functional.linear(t["x"], t["weight"]) if "weight" in t else t["x"]
        h = functional.dropout(functional.gelu(functional.linear(y, t["down"])), dropout)
        return y + functional.linear(h, t["up"])

    return lora if operation.name == "lora_linear" else bottleneck


def addmm(operation: Operation, dropout: float) -> Run:
    """The same with the branch's last product and its sum in one call."""

    def lora(t: Tensors) -> torch.Tensor:
        s = functional.dropout(t["x"], dropout) @ t["lora_a"].t()
        return torch.addmm(t["x"] @ t["weight"].t(), s, t["lora_b"].t())

    def bottleneck(t: Tensors) -> torch.Tensor:
        y = t["x"] @ t["weight"].t() if "weight" in t else t["x"]
        h = functional.dropout(functional.gelu(y @ t["down"].t()), dropout)
        return torch.addmm(y, h, t["up"].t())

    return lora if operation.name == "lora_linear" else bottleneck


def peft_layer(sizes: Sizes, dropout: float, weight: torch.Tensor) -> Run:
    """PEFT's LoRA layer, its adapter in the weight's dtype; takes the given A and B."""
    from peft import LoraConfig, inject_adapter_in_model

    base = nn.Linear(sizes.k, sizes.n, bias=False, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(r=sizes.r, lora_alpha=sizes.r, lora_dropout=dropout, target_modules=["0"])
    model = inject_adapter_in_model(config, nn.Sequential(base)).to(weight).train()
    a, b = (adapters["default"] for adapters in (model[0].lora_A, model[0].lora_B))

    def run(t: Tensors) -> torch.Tensor:
        for layer, name in ((a, "lora_a"), (b, "lora_b")):
            layer.weight = t[name]  # the same leaf that the other providers get
        return model(t["x"])

    for layer in (a, b):
        del layer.weight  # so that a plain tensor may take its place
    return run


def peers(operation: Operation, sizes: Sizes, tensors: Tensors, dropout: float) -> dict[str, Run]:
    """Name -> run, of those that there are for this operation on this machine."""
    found = {"plain": plain(operation, dropout), "addmm": addmm(operation, dropout)}
    if "weight" in tensors:
        found["bare"] = lambda t: functional.linear(t["x"], t["weight"])
    if operation.name == "lora_linear" and HAS_PEFT:
        found["peft"] = peft_layer(sizes, dropout, tensors["weight"])
    return found
