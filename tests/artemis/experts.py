"""Experts alone: packed, given routed hidden states, run with gradients."""

import torch
from torch import nn

from artemis.experts import matrices_of, stack_of
from artemis.layers.expert_weights import ExpertWeights
from artemis.layers.packed import sample
from artemis.layers.packed_experts import pack_experts


def packed(module: nn.Module, format: str = "int8", bits: int | str = 16) -> nn.Module:
    weights = {}
    for name in matrices_of(module):
        stack = ExpertWeights.quantize(stack_of(module, name), format, activation_bits=bits)
        weights[name] = stack, sample(module._parameters[name])
    pack_experts(module, weights)
    return module


def routed(rows: int, width: int = 32, experts: int = 4) -> list[torch.Tensor]:
    """Hidden states, two different experts for each, and their weights."""
    chosen = torch.stack([torch.randperm(experts)[:2] for _ in range(rows)])
    return [torch.randn(rows, width), chosen, torch.rand(rows, 2)]


def run(module: nn.Module, hidden, chosen, weights, dtype=torch.float32):
    """Output, and the gradients of hidden states and of the routing's weights."""
    hidden, weights = (t.detach().to(dtype).requires_grad_() for t in (hidden, weights))
    output = module(hidden, chosen, weights)
    torch.manual_seed(7)
    output.backward(torch.randn(output.shape).to(dtype))
    return output, hidden.grad, weights.grad
