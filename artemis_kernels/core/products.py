"""Matrix products with a thin side: of bf16 by a pass of our own, others as BLAS is fastest."""

from typing import NamedTuple

import torch

from .thin_products import multiply

_THIN = 16


class LowRank(NamedTuple):
    """A term `alpha·s gᵀ` [M, N] of a product, of s [M, r] and g [N, r]."""

    s: torch.Tensor
    g: torch.Tensor
    alpha: float = 1.0

    @property
    def rank(self) -> int:
        return self.s.shape[1]

    @staticmethod
    def added_to(y: torch.Tensor, term: "LowRank | None") -> torch.Tensor:
        """`y + term`, in place."""
        if term is None or term._product(y.dtype, y, y) is not None:
            return y
        return y.addmm_(term.s.to(y.dtype), term.g.to(y.dtype).t(), alpha=term.alpha)

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        """The term alone, in `dtype`."""
        y = self._product(dtype)
        if y is not None:
            return y
        y = torch.mm(self.s.to(dtype), self.g.to(dtype).t())
        return y if self.alpha == 1 else y.mul_(self.alpha)

    def plus(self, start: torch.Tensor) -> torch.Tensor:
        """`start + term` as a new tensor."""
        y = self._product(start.dtype, None, start)
        if y is not None:
            return y
        s, g = self.s.to(start.dtype), self.g.to(start.dtype)
        return torch.addmm(start, s, g.t(), alpha=self.alpha)

    def _product(self, dtype: torch.dtype, out=None, start=None) -> torch.Tensor | None:
        """`start + term` by a pass of our own, or None."""
        if dtype != torch.bfloat16:
            return None
        return multiply(self.s, self.g.t(), out, start=start, alpha=self.alpha)


def project(
    x: torch.Tensor, f: torch.Tensor, bias: torch.Tensor | None = None, alpha: float = 1.0
) -> torch.Tensor:
    """`alpha·x fᵀ + bias` for x [M, K], f [R, K] and bias [R], in x's dtype.

    With few rows in f, MKL's fp32 product is up to 2.5 times faster as `(f xᵀ)ᵀ`.
    """
    if x.dtype == torch.bfloat16:
        z = multiply(x, f.t(), bias=bias, alpha=alpha)
        if z is not None:
            return z
    f = f.to(x.dtype)
    if bias is not None:
        return torch.addmm(bias.to(x.dtype), x, f.t(), alpha=alpha)
    few = f.shape[0] <= _THIN and x.dtype == torch.float32 and x.device.type == "cpu"
    z = torch.mm(f.contiguous(), x.t()).t() if few else torch.mm(x, f.t())
    return z if alpha == 1 else z.mul_(alpha)


def outer_gradient(left: torch.Tensor, right: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """`alpha·leftᵀ right` summed over rows, for left [M, P] and right [M, Q]: a weight's gradient.

    In fp32 for 16 bits, else in their dtype. The thin factor goes first, `(rightᵀ left)ᵀ` where
    right is the narrower one: always in bf16, in fp32 up to a few columns.
    """
    if left.dtype == torch.float16:  # whose sums over rows may exceed it before alpha is applied
        left, right = left.float(), right.float()
    p, q, in_bf16 = left.shape[1], right.shape[1], left.dtype == torch.bfloat16
    if in_bf16:
        thin, wide = (right, left) if q < p else (left, right)
        out = multiply(
            _with_lines(thin).t(), wide, dtype=torch.float32, by_columns=q < p, alpha=alpha
        )
        if out is not None:
            return out.t() if q < p else out
    turned = q < p and (q <= _THIN or left.dtype != torch.float32)
    out = torch.mm(right.t(), left).t() if turned else torch.mm(left.t(), right)
    out = out.float() if in_bf16 else out
    return out if alpha == 1 else out.mul_(alpha)


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over rows of `dtype` are handed on in: they leave fp16's range."""
    return torch.float32 if dtype == torch.float16 else dtype


def through_weight(sums: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`sums weightᵀ` [R, N] for sums over rows [R, K] and weight [N, K], in the weight's dtype.

    Those of fp16 go in divided by the largest of their row, and come out multiplied by it, in fp32.
    """
    if weight.dtype != torch.float16:
        return torch.mm(sums.to(weight.dtype), weight.t())
    largest = sums.abs().amax(1, keepdim=True).clamp_min(torch.finfo(sums.dtype).tiny)
    return torch.mm((sums / largest).to(weight.dtype), weight.t()).to(sums.dtype) * largest


def _with_lines(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it, whose rows or columns lie in one piece."""
    return x if 1 in x.stride() else x.contiguous()


def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`Σ a ⊙ b`, accumulated in fp32 or better."""
    wide = accumulator(a.dtype)
    return (a.to(wide) * b.to(wide)).sum()


def column_sum(x: torch.Tensor) -> torch.Tensor:
    """`Σ` over rows, accumulated and returned in fp32 or better."""
    return x.sum(0, dtype=accumulator(x.dtype))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are formed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
