"""What `attention` means, in plain torch; the oracle of its tests."""

import torch


def attention(
    q: torch.Tensor,  # [B, H, T, D]
    k: torch.Tensor,  # [B, G, S, D]
    v: torch.Tensor,  # [B, G, S, E]
    mask: torch.Tensor | None,  # bool [B or 1, 1, T, S]; True = seen
    scale: float,
    causal: bool,
) -> torch.Tensor:
    """Return [B, H, T, E] in q's dtype, rounded once; a query that sees no key gets 0."""
    at_least = torch.promote_types(q.dtype, torch.float32)
    share = q.shape[1] // k.shape[1]
    k, v = (x.to(at_least).repeat_interleave(share, 1) for x in (k, v))
    scores = q.to(at_least) @ k.transpose(2, 3) * scale
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    if mask is None:
        return (scores.softmax(-1) @ v).to(q.dtype)
    p = scores.masked_fill(~mask, torch.finfo(at_least).min).softmax(-1)
    return (p.masked_fill(~mask, 0) @ v).to(q.dtype)
