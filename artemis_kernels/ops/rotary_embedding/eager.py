"""`rotary_embedding` on a CPU: a compiled pass each way, else plain torch.

    forward    y = x·cos + (−x₂, x₁)·sin          of the halves x₁ and x₂ of a head
    backward   dx = dy·cos + (dy₂·sin₂, −dy₁·sin₁)

Nothing but cos and sin is kept for the backward.
"""

import torch

from ...core import native
from ...core.widened import at_least_fp32


def forward(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, T, D] and k [B, G, T, D] turned, contiguous: as attention multiplies them."""
    cos, sin = _as_read(cos, q), _as_read(sin, q)
    turned = q.new_empty(q.shape), k.new_empty(k.shape)
    return _turned(q, cos, sin, turned[0], False), _turned(k, cos, sin, turned[1], False)


def backward(
    dq: torch.Tensor, dk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of q and k, in memory as [B, T, H, D]: as the projections write them."""
    cos, sin = _as_read(cos, dq), _as_read(sin, dq)
    found = [d.new_empty(d.transpose(1, 2).shape).transpose(1, 2) for d in (dq, dk)]
    return _turned(dq, cos, sin, found[0], True), _turned(dk, cos, sin, found[1], True)


def _as_read(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """cos or sin as the passes read them: fp32, or better for a better x."""
    return table.to(at_least_fp32(x.dtype)).contiguous()


def _turned(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, y: torch.Tensor, backwards: bool
) -> torch.Tensor:
    library = native.library_for(x)
    if library is None:
        return y.copy_(_plain(x, cos[:, None], sin[:, None], backwards))
    x = x if x.stride(3) == 1 else x.contiguous()
    getattr(library, f"artemis_rotary_{native.NAMES[x.dtype]}")(
        x.data_ptr(), *x.stride()[:3], cos.data_ptr(), sin.data_ptr(), y.data_ptr(),
        *y.stride()[:3], *x.shape, len(cos), backwards, torch.get_num_threads(),
    )  # fmt: skip
    return y


def _plain(x, cos, sin, backwards):
    wide = x.to(cos.dtype)
    if backwards:
        first, second = (wide * sin).chunk(2, -1)
        return wide * cos + torch.cat((second, -first), -1)
    first, second = wide.chunk(2, -1)
    return wide * cos + torch.cat((-second, first), -1) * sin
