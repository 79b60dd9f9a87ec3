"""What the tests of the operations between products share: their paths, and what is accurate."""

from collections.abc import Callable

import pytest
import torch

from artemis_kernels.core import native
from artemis_kernels.core.device import why_no_triton

SINGLE, BF16, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = pytest.mark.parametrize("dtype", [SINGLE, BF16, HALF], ids=str)
KERNELS = ["triton"] if why_no_triton(torch.device("cpu")) is None else []
PATHS = ["compiled", "plain", *KERNELS]
OPERATORS = ["eager", *KERNELS]  # the values of `impl` that a torch operator takes


def impl_of(path: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`impl` of a path for the tensors given, the operation's own choice set aside."""
    if path == "plain":
        monkeypatch.setattr(native, "library_for", lambda x: None)

    def impl(*given: torch.Tensor) -> str:
        if path == "compiled" and native.library_for(given[0]) is None:
            pytest.skip("there is no compiled pass for these tensors")
        if path == "triton" and BF16 in [tensor.dtype for tensor in given]:
            pytest.skip("the interpreter truncates to bf16")
        return path if path in ("triton", "reference") else "eager"

    return impl


def assert_rounded_once(
    got: torch.Tensor, truth: torch.Tensor, terms: torch.Tensor, name: str = "y"
) -> None:
    """`got` is the fp64 `truth`, rounded from fp32: off by half a step, and 2e-6 of its `terms`.

    `terms` bound what was added up, which may cancel: absolute values, of truth's shape.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}"
    assert torch.isfinite(got).all(), f"{name} is not finite"
    allowed = torch.finfo(got.dtype).eps / 2 * truth.abs() + 2e-6 * terms
    if got.dtype == HALF:
        allowed = allowed + 2.0**-25  # half a step of its smallest numbers
    wrong = (got.double() - truth).abs() > allowed
    assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.numel()} elements"
