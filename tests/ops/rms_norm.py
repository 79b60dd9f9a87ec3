"""`rms_norm` in fp64 by its formula, and how far from it a result may be."""

import torch

from tests import kit
from tests.ops.rows import SINGLE, assert_rounded_once

EPS = 1e-6


def operands(m: int, n: int, dtype=SINGLE, spread=1.0):
    x, weight, dy = torch.randn(m, n) * spread, 1 + torch.randn(n) / 4, torch.randn(m, n)
    return x.to(dtype), weight.to(dtype), dy.to(dtype)


def formula(x, weight, eps=EPS):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def gradients(run, x, weight, dy, eps=EPS):
    """y, dx and dw of `run`, their arguments in the layout given and left as they were."""
    leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
    before = x.clone()
    y = run(*leaves, eps)
    y.backward(dy)
    kit.assert_same_bits(x.detach(), before, "x, an input")
    return y.detach(), leaves[0].grad, leaves[1].grad


def assert_right(got, x, weight, dy, eps=EPS):
    """Against the formula; the terms of dx are both summands, those of dw are of its rows."""
    wide = x.double(), weight.double(), dy.double()
    y, dx, dw = gradients(formula, *wide, eps)
    r = 1 / (wide[0].square().mean(-1, keepdim=True) + eps).sqrt()
    normal, g = wide[0] * r, wide[2] * wide[1]
    along = (g * normal).abs().mean(-1, keepdim=True)
    assert got[0].dtype == got[1].dtype == x.dtype and got[2].dtype == weight.dtype
    assert_rounded_once(got[0], y, y.abs(), "y")
    assert_rounded_once(got[1], dx, r * (g.abs() + normal.abs() * along), "dx")
    assert_rounded_once(got[2], dw, (wide[2] * normal).abs().sum(0), "dw")
