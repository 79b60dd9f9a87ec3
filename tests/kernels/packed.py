"""Tiles, and the epilogue with its truth, for kernels over packed weights."""

import torch

from artemis_kernels.core.tiling import Config
from artemis_kernels.ops.low_rank.arguments import NO_DROPOUT, Scale
from artemis_kernels.ops.packed.epilogue import Epilogue
from tests.kernels.truth import dropped

TINY = Config(16, 32, 32, 16, warps=1, stages=1)


def terms(m: int, n: int, r: int, by=NO_DROPOUT) -> Epilogue:
    """The whole low-rank epilogue."""
    return Epilogue(
        torch.randn(m, r), torch.randn(r, n).t(), torch.randn(n), torch.randn(n),
        Scale(0.5, torch.tensor(-1.5)), by,
    )  # fmt: skip


def added(epilogue: Epilogue, dtype: torch.dtype) -> torch.Tensor:
    """What `terms` adds, in fp64."""
    sigma = (epilogue.scale.number * epilogue.scale.tensor).float()
    s = (epilogue.s * sigma).to(dtype).double()
    low = dropped(s @ epilogue.b.to(dtype).double().t(), epilogue.dropout)
    return low + sigma.double() * epilogue.bias_low.double() + epilogue.bias.double()
