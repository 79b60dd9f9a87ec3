"""These tests run kernels on CPU tensors, which only the interpreter does."""

import pytest
import torch

from artemis_kernels.core.device import why_no_triton


@pytest.fixture(autouse=True)
def interpreted():
    """Skip where kernels are compiled for a GPU instead: tests/ops runs them there."""
    blocker = why_no_triton(torch.device("cpu"))
    if blocker is not None:
        pytest.skip(f"needs the interpreter: {blocker}")
