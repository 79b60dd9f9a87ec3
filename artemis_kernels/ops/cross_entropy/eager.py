"""`cross_entropy` on a CPU: a compiled pass over the logits each way, else plain torch.

    forward    most = max_j x[j]   log_sum = log Σ_j e^(x[j] − most)
               loss = log_sum − (x[target] − most)
    backward   dx[j] = (e^(x[j] − most − log_sum) − [j = target])·d

Kept for the backward: the logits themselves, and `most` and `log_sum` of each row.
"""

import torch

from ...core import native
from ...core.widened import widened


def forward(
    logits: torch.Tensor, target: torch.Tensor, ignored: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [M] and what the backward needs of each row [M, 2], fp32 or better."""
    if native.library_for(logits) is None:
        return _plain_forward(logits, target, ignored)
    logits, (m, n) = logits.contiguous(), logits.shape
    losses = logits.new_empty(m, dtype=torch.float32)
    kept = logits.new_empty(m, 2, dtype=torch.float32)
    _pass("forward", logits)(
        logits.data_ptr(), target.data_ptr(), losses.data_ptr(), kept.data_ptr(), m, n, ignored,
        torch.get_num_threads(),
    )  # fmt: skip
    return losses, kept


def backward(
    d: torch.Tensor, logits: torch.Tensor, target: torch.Tensor, kept: torch.Tensor, ignored: int
) -> torch.Tensor:
    """The logits' gradient [M, classes], in their dtype, for d [M] of the losses."""
    if native.library_for(logits) is None:
        return _plain_backward(d, logits, target, kept, ignored)
    logits, d, (m, n) = logits.contiguous(), d.contiguous(), logits.shape
    dlogits = torch.empty_like(logits)
    _pass("backward", logits)(
        logits.data_ptr(), target.data_ptr(), kept.data_ptr(), d.data_ptr(), dlogits.data_ptr(),
        m, n, ignored, torch.get_num_threads(),
    )  # fmt: skip
    return dlogits


def _pass(way: str, logits: torch.Tensor):
    name = f"artemis_cross_entropy_{way}_{native.NAMES[logits.dtype]}"
    return getattr(native.library_for(logits), name)


def _plain_forward(logits, target, ignored):
    x = widened(logits)
    most = x.amax(1, keepdim=True)
    shifted = x - most
    log_sum = shifted.exp().sum(1, keepdim=True).log_()
    counts = (target != ignored)[:, None]
    at_target = shifted.gather(1, torch.where(counts, target[:, None], 0))
    losses = torch.where(counts, log_sum - at_target, 0)
    return losses[:, 0], torch.cat((most, log_sum), 1)


def _plain_backward(d, logits, target, kept, ignored):
    counts = (target != ignored)[:, None]
    p = (widened(logits) - kept[:, :1] - kept[:, 1:]).exp_()
    p.scatter_add_(1, torch.where(counts, target[:, None], 0), -counts.to(p.dtype))
    return torch.where(counts, p * d[:, None], 0).to(logits.dtype).contiguous()
