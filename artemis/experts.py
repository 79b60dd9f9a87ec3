"""What transformers says of a module that holds the matrices of many experts, each kind in one.

Its decorator `use_experts_implementation` marks such modules, of any model, and states their form:
`has_bias`, `is_transposed`, and, in newer versions, `has_gate` and `has_post_expert_norm`. By these
alone its own implementations compute: rows of an expert times the first matrix, `_apply_gate` or
`act_fn`, times the second, a norm, the weights of the routing.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.integrations import moe

_Layer = Callable[[torch.Tensor], torch.Tensor]


def matrices_of(module: nn.Module) -> tuple[str, str]:
    """Names of the parameters that hold the matrices of a module of experts."""
    return "gate_up_proj" if _has_gate(module) else "up_proj", "down_proj"


def expert_output(
    module: nn.Module, rows: torch.Tensor, first: _Layer, second: _Layer
) -> torch.Tensor:
    """What one expert of `module` makes of its rows, by its two linear layers."""
    rows = first(rows)
    rows = module._apply_gate(rows) if _has_gate(module) else module.act_fn(rows)
    rows = second(rows)
    return module.post_expert_norm(rows) if _has_norm(module) else rows


def bias_of(module: nn.Module, name: str, expert: int) -> torch.Tensor | None:
    """The bias beside an expert's matrix under `name`."""
    return module._parameters[f"{name}_bias"][expert] if module.has_bias else None


def stack_of(module: nn.Module, name: str) -> torch.Tensor:
    """The matrices under `name` as (experts, out, in), however they are stored."""
    stack = module._parameters[name].detach()
    return stack.transpose(1, 2) if module.is_transposed else stack


def is_experts(module: nn.Module) -> bool:
    """Whether `module` is one of experts and has the form that transformers states of it.

    A forward of its own, other parameters or other shapes: then its form is not known.
    """
    forward = getattr(type(module), "forward", None)
    dispatches = getattr(forward, "__globals__", {}).get("__name__") == moe.__name__
    if not dispatches or getattr(module, "_is_expert_parallel", False):
        return False
    stacks = matrices_of(module)
    biases = [f"{name}_bias" for name in stacks] if module.has_bias else []
    children = {"act_fn", "post_expert_norm"} if _has_norm(module) else {"act_fn"}
    if module._parameters.keys() != {*stacks, *biases} or module._modules.keys() - children:
        return False
    plain = all(type(p.data) is torch.Tensor for p in module._parameters.values())
    return plain and _shapes_fit(module, stacks, biases)


def _has_gate(module: nn.Module) -> bool:
    return getattr(module, "has_gate", True)  # transformers 5.0 marks no others


def _has_norm(module: nn.Module) -> bool:
    return getattr(module, "has_post_expert_norm", False)


def _shapes_fit(module: nn.Module, stacks: tuple[str, str], biases: list[str]) -> bool:
    shapes = [module._parameters[name].shape for name in stacks]
    if any(len(shape) != 3 or shape[0] != module.num_experts for shape in shapes):
        return False
    rows = [stack_of(module, name).shape[:2] for name in stacks]
    return all(
        module._parameters[bias].shape == wanted for bias, wanted in zip(biases, rows, strict=False)
    )
