"""Cases of the loss: rows of a large vocabulary (rows of an odd one have no vector loads)."""

import torch

from artemis_kernels.ops.cross_entropy import kernels
from tests.aot.case import BF16, FP32, Case, meta

_IGNORED = -100


def _forward(m, n, dtype):
    def launch(chip):
        kernels.forward(meta(m, n, dtype=dtype), meta(m, dtype=torch.int64), _IGNORED)

    return launch


def _backward(m, n, dtype):
    def launch(chip):
        x, target = meta(m, n, dtype=dtype), meta(m, dtype=torch.int64)
        kernels.backward(meta(m), x, target, meta(m, 2), _IGNORED)

    return launch


CASES = (
    Case("cross_entropy", _forward(8192, 128256, BF16)),
    Case("cross_entropy fp32", _forward(8192, 128256, FP32), fp32=True),
    Case("cross_entropy gradient", _backward(8192, 128256, BF16)),
    Case("cross_entropy gradient fp32", _backward(8192, 128256, FP32), fp32=True),
)
