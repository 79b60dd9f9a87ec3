"""The loss of a causal language model, computed from its logits as they are stored.

transformers copies the logits to fp32 first, and torch keeps and passes over that copy several
times more: for a vocabulary of 128,256 each copy takes half a gigabyte per 1,024 tokens.
`artemis_kernels.cross_entropy` reads them as they are, a pass each way.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

import artemis_kernels


def causal_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **_: object,
) -> torch.Tensor:
    """What `transformers.loss.loss_utils.ForCausalLMLoss` computes, without its fp32 copy.

    Args:
        logits: [..., length, vocab_size], floating.
        labels: [..., length], int64: the tokens themselves; each is predicted by the one before.
        num_items_in_batch: divides the sum; None: the mean over the labels that count.
        shift_labels: labels that are shifted already, in the place of `labels`.

    Returns:
        0-d, fp32 (fp64 for fp64 logits).
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    logits, target = logits.reshape(-1, vocab_size), shift_labels.reshape(-1).to(logits.device)
    if num_items_in_batch is None:
        return artemis_kernels.cross_entropy(logits, target, ignore_index=ignore_index)
    total = artemis_kernels.cross_entropy(
        logits, target, ignore_index=ignore_index, reduction="sum"
    )
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


@contextlib.contextmanager
def lean_loss(model: nn.Module) -> Iterator[None]:
    """Let a transformers causal language model compute its loss by `causal_loss` in this context.

    A model with another loss, its own or that of another task, is left alone.
    """
    # Asked for its loss, a model without a type of loss warns.
    typed = getattr(model, "loss_type", None) == "ForCausalLM"
    if not typed or model.loss_function is not ForCausalLMLoss:
        yield
        return
    model.loss_function = causal_loss
    try:
        yield
    finally:
        model.loss_function = ForCausalLMLoss
