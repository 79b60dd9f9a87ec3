"""The attention mask of a step that is captured as a CUDA graph.

transformers looks for several sequences packed into one row by their positions, also where the
model counts those itself, 0, 1, 2 and so on. In a capture it cannot look, and builds a mask for
whatever it might have found: attention then reads a tensor, and takes slower kernels than the
causal ones that the same step takes otherwise.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import masking_utils


@contextlib.contextmanager
def unpacked_rows(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Let transformers know in this context that no row is packed, if `inputs` bring no positions.

    With positions of their own it does as it does in a capture, which is right for any.
    """
    if inputs.get("position_ids") is not None:
        yield
        return
    usual = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = usual
