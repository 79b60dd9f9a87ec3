"""What an operation is compared with: plain torch, `addmm` by hand, `torch.compile`, PEFT's layer.

The bare product of the frozen layer is no peer but what none can go below. PEFT stands twice: with
adapters in the base's dtype, its fastest setting, and in float32, its default. Liger Kernel fuses
norms, rotary embeddings, feed-forward activations and losses, and has nothing to set beside these.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from ..training.compiling import can_compile
from .operations import Operation, Sizes, Tensors

HAS_PEFT = importlib.util.find_spec("peft") is not None
Run = Callable[[Tensors], torch.Tensor]
#: Those that compute what an operation does; the fastest of them is its best peer.
PEERS = ("plain", "addmm", "compile", "peft", "peft, fp32 adapters")


def _with_fp32_adapters(tensors: Tensors) -> Tensors:
    return tensors | {name: tensors[name].float() for name in ("lora_a", "lora_b")}


#: Provider -> what it makes, before it is timed, of the tensors that all others share.
OWN_TENSORS: dict[str, Callable[[Tensors], Tensors]] = {"peft, fp32 adapters": _with_fp32_adapters}


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


def compiled(run: Run) -> Run:
    """`run` by `torch.compile`, for the very shapes it is called with."""
    torch.compiler.reset()  # what was compiled for other sizes would make these dynamic
    return torch.compile(run, dynamic=False)


def peft_layer(sizes: Sizes, dropout: float, weight: torch.Tensor, wide: bool = False) -> Run:
    """PEFT's LoRA layer with the given A and B, in the weight's dtype or, if `wide`, in float32."""
    from peft import LoraConfig, inject_adapter_in_model

    base = nn.Linear(sizes.k, sizes.n, bias=False, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(r=sizes.r, lora_alpha=sizes.r, lora_dropout=dropout, target_modules=["0"])
    model = inject_adapter_in_model(config, nn.Sequential(base)).to(weight).train()
    a, b = (adapters["default"] for adapters in (model[0].lora_A, model[0].lora_B))

    def run(t: Tensors) -> torch.Tensor:
        for layer, name in ((a, "lora_a"), (b, "lora_b")):
            layer.weight = t[name].float() if wide else t[name]  # the leaf that the others get
        return model(t["x"])

    for layer in (a, b):
        del layer.weight  # so that a plain tensor may take its place
    return run


def peers(operation: Operation, sizes: Sizes, tensors: Tensors, dropout: float) -> dict[str, Run]:
    """Name -> run, of those that there are for this operation on this machine."""
    found = {"plain": plain(operation, dropout), "addmm": addmm(operation, dropout)}
    if can_compile(tensors["x"].device):
        found["compile"] = compiled(plain(operation, dropout))
    if "weight" in tensors:
        found["bare"] = lambda t: functional.linear(t["x"], t["weight"])
    if operation.name == "lora_linear" and HAS_PEFT:
        weight = tensors["weight"]
        found["peft"] = peft_layer(sizes, dropout, weight)
        if weight.dtype != torch.float32:
            found["peft, fp32 adapters"] = peft_layer(sizes, dropout, weight, wide=True)
    return found
