"""The attention mask of a step that is captured as a CUDA graph.

In a capture nothing can be read, so transformers builds a mask for whatever it might have found:
padding, or several sequences packed into one row, which it looks for by their positions. It does so
too where there is nothing to look at: a batch without a mask (up to transformers 5.17), positions
that the model counts itself, 0, 1, 2 and so on. Attention then reads a tensor, and takes slower
kernels than the causal ones that the same step takes outside.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import masking_utils


@contextlib.contextmanager
def without_idle_masks(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Have transformers build a mask, in this context, only for what `inputs` bring.

    A mask or positions of theirs are treated as in any capture, which is right whatever they hold.
    """
    tracing = masking_utils.is_tracing
    answers = {"is_tracing": lambda tensor=None: tensor is not None and tracing(tensor)}
    if inputs.get("position_ids") is None:
        answers["find_packed_sequence_indices"] = lambda position_ids: None
    before = {name: getattr(masking_utils, name) for name in answers}
    try:
        vars(masking_utils).update(answers)
        yield
    finally:
        vars(masking_utils).update(before)
