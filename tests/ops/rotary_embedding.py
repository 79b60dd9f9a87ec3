"""`rotary_embedding` in fp64 by a matrix, and how far from it a result may be."""

import torch

from tests import kit
from tests.ops.rows import SINGLE, assert_rounded_once


def operands(b: int, h: int, g: int, t: int, d: int, dtype=SINGLE, tables: int | None = None):
    """q, k, cos, sin and the upstream gradients; the halves of cos and of sin differ."""
    q, k, dq, dk = (torch.randn(b, heads, t, d).to(dtype) for heads in (h, g, h, g))
    cos, sin = torch.randn(2, b if tables is None else tables, t, d).to(dtype)
    return q, k, cos, sin, dq, dk


def formula(q, k, cos, sin):
    """x·cos + (R x)·sin, R written out: −1 from the second half to the first, 1 back."""
    half = q.shape[-1] // 2
    eye = torch.eye(half, dtype=q.dtype, device=q.device)
    zero = torch.zeros_like(eye)
    turn = torch.cat((torch.cat((zero, eye), 1), torch.cat((-eye, zero), 1)))
    return tuple(x * cos[:, None] + (x @ turn) * sin[:, None] for x in (q, k))


def gradients(run, q, k, cos, sin, dq, dk):
    """Both results and both gradients; q and k are left as they were."""
    leaves = q.detach().requires_grad_(), k.detach().requires_grad_()
    before = q.clone(), k.clone()
    turned = run(*leaves, cos, sin)
    torch.autograd.backward(turned, (dq, dk))
    for leaf, was in zip(leaves, before, strict=True):
        kit.assert_same_bits(leaf.detach(), was, "an input")
    return *(y.detach() for y in turned), *(leaf.grad for leaf in leaves)


def assert_right(got, *given):
    """Against the formula; the terms are the two products of each element."""
    wide = [t.double() for t in given]
    wanted = gradients(formula, *wide)
    most = 2 * max((t.abs().max() for t in wide[2:4] if t.numel()), default=0.0)
    terms = [most * x.abs().amax((-1,), keepdim=True) if x.numel() else x for x in (
        wide[0], wide[1], wide[4], wide[5],
    )]  # fmt: skip
    for name, one, true, bound in zip(("q", "k", "dq", "dk"), got, wanted, terms, strict=True):
        assert one.dtype == given[0].dtype
        assert_rounded_once(one, true, bound, name)
