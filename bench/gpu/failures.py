"""What a launch or a compilation can end in, and what a row says of it."""

from typing import Any

import torch
import triton

#: Of one case, which fails, not the run; descriptors check by asserting.
FAILURES = (RuntimeError, ValueError, TypeError, AssertionError, triton.TritonError)


def out_of_memory(error: Exception) -> bool:
    """Whether a GPU's memory ran out; Triton and cuBLAS say so in words."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def failure(error: Exception) -> dict[str, Any]:
    """`passed` is None where memory ran out: what did not run is not known to be wrong."""
    passed = None if out_of_memory(error) else False
    return {"passed": passed, "where": f"{type(error).__name__}: {error}"[:300]}
