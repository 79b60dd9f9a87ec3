"""Matrices for the products of our own over bf16, and how near to fp64 these have to be."""

import math

import torch

BF16, F32, INT8 = torch.bfloat16, torch.float32, torch.int8


def numbers(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    if dtype == INT8:
        return torch.randint(-128, 128, shape, dtype=dtype)
    return torch.randn(shape).to(dtype)


def in_columns(t: torch.Tensor) -> torch.Tensor:
    return t.t().contiguous().t()


def in_a_wider_one(t: torch.Tensor) -> torch.Tensor:
    """Rows of stride 1, with nan (or what int8 has for it) right behind each."""
    filler = -128 if t.dtype == INT8 else math.nan
    wide = t.new_full((t.shape[0], t.shape[1] + 3), filler)
    wide[:, : t.shape[1]] = t
    return wide[:, : t.shape[1]]


def within(found: torch.Tensor, wanted: torch.Tensor, terms: torch.Tensor) -> bool:
    """Off by no more than fp32 sums of `terms`, their magnitudes, and half a unit of a bf16."""
    room = 1e-6 * (1 + terms)
    if found.dtype == BF16:
        room = room + wanted.abs().log2().floor().exp2() / 256
    return bool(((found.double() - wanted).abs() <= room).all())
