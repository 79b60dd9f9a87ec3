"""What single kernels are held to: the same sums in fp64, from torch and the plain mask.

`TINY` tiles are smaller than the matrices of these tests, so that every kernel meets several
tiles along every dimension and a ragged last one.
"""

from dataclasses import replace

import torch

from artemis_kernels.core import rng
from artemis_kernels.core.tiling import Config
from artemis_kernels.ops.bottleneck_adapter.reference import ACTIVATIONS
from artemis_kernels.ops.low_rank.arguments import NO_DROPOUT, Dropout

TINY = Config(16, 16, 16, 16, warps=1, stages=1)
TINY_SPLIT = replace(TINY, split=3)

SEED = (1 << 40) + 12345


def dropout(p: float = 0.4) -> Dropout:
    return Dropout(p, torch.tensor([SEED]))


def dropped(x: torch.Tensor, by: Dropout = NO_DROPOUT) -> torch.Tensor:
    """x in fp64 with the mask applied."""
    if not by.p:
        return x.double()
    keep = rng.dropout_mask(x.shape, by.p, by.seed, x.device)
    return torch.where(keep, x.double() * rng.keep_scale(by.p), 0)


def units(z: torch.Tensor, activation: str, by: Dropout = NO_DROPOUT) -> torch.Tensor:
    """`h = dropout(act(z))` in fp64."""
    return dropped(ACTIVATIONS[activation](z.double()), by)


def units_gradient(
    dh: torch.Tensor, z: torch.Tensor, activation: str, by: Dropout = NO_DROPOUT
) -> torch.Tensor:
    """`dz` of `units` in fp64, by autograd."""
    leaf = z.double().requires_grad_()
    (dz,) = torch.autograd.grad(units(leaf, activation, by), leaf, dh.double())
    return dz


def rounded(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x as a kernel uses it: rounded to the dtype of `like`, in fp64."""
    return x.to(like.dtype).double()


def assert_close(actual: torch.Tensor, exact: torch.Tensor, *, roundings: float = 1.0) -> None:
    """Equal up to fp32 sums, or to so many roundings to a 16-bit dtype of the result."""
    assert actual.shape == exact.shape
    eps = torch.finfo(actual.dtype).eps
    tolerance = 16 * eps if actual.dtype == torch.float32 else roundings * eps
    largest = exact.abs().max() if exact.numel() else 0.0
    error = (actual.double() - exact.double()).abs()
    assert torch.isfinite(actual).all()
    assert (error <= tolerance * torch.maximum(exact.abs().double(), largest / 8)).all(), (
        f"worst {error.max():.3g} where the largest value is {largest:.3g}"
    )
