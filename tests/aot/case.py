"""What a case is: one launch on meta tensors, as a chip would get it, and what it stands for."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from artemis_kernels.core.device import Chip
from artemis_kernels.ops.low_rank.arguments import Dropout, Scale

BF16, FP32 = torch.bfloat16, torch.float32
FP8 = torch.float8_e4m3fn
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
WITH_FP8 = ("sm_90", "sm_100")
WITH_TMA = ("sm_90", "sm_100")


class Case(NamedTuple):
    """A named launch; `training`: its tiles suit the chip's widest tensor-core instruction.

    `eight_bit`: its main loop multiplies 8-bit numbers; `chips`: where it may run.
    """

    name: str
    launch: Callable[[Chip], object]
    training: bool = False
    fp32: bool = False
    chips: tuple[str, ...] = TARGETS
    eight_bit: bool = False


def meta(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def drawn() -> Dropout:
    return Dropout(0.1, meta(1, dtype=torch.int64))


def scaled() -> Scale:
    return Scale(0.5, meta())
