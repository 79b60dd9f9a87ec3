"""`gated_activation` in fp64 by its formulas, and how far from them a result may be."""

import math

import torch

from tests import kit
from tests.ops.rows import SINGLE, assert_rounded_once

FORMULAS = {
    "relu": lambda z: torch.where(z > 0, z, 0.0 * z),
    "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "gelu_tanh": lambda z: z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "identity": lambda z: z,
}


def operands(*shape: int, dtype=SINGLE, spread=2.0):
    gate = (torch.randn(shape) * spread).to(dtype)
    return gate, torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


def formula(gate, up, activation):
    return FORMULAS[activation](gate) * up


def gradients(run, gate, up, dy, activation="silu"):
    """y and the gradients of gate and up, which are left as they were."""
    leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
    before = gate.clone(), up.clone()
    y = run(*leaves, activation)
    y.backward(dy)
    for leaf, was in zip(leaves, before, strict=True):
        kit.assert_same_bits(leaf.detach(), was, "an input")
    return y.detach(), leaves[0].grad, leaves[1].grad


def assert_right(got, gate, up, dy, activation="silu"):
    """Against the formula; act(z) errs by its terms, which are z's and cancel where z < 0."""
    wide = gate.double(), up.double(), dy.double()
    terms = wide[0].abs() + 1
    bounds = terms * wide[1].abs(), terms * (wide[1] * wide[2]).abs(), terms * wide[2].abs()
    for name, one, true, bound in zip(
        ("y", "dgate", "dup"), got, gradients(formula, *wide, activation), bounds, strict=True
    ):
        assert one.dtype == gate.dtype
        assert_rounded_once(one, true, bound, name)
