"""`rotary_embedding` on a CPU: a compiled pass each way, else plain torch.

    forward    y = x·cos + (−x₂, x₁)·sin          of the halves x₁ and x₂ of a head
    backward   dx = dy·cos + (dy₂·sin₂, −dy₁·sin₁)

Nothing but cos and sin is kept for the backward.
"""

import torch

from ...core import native


def forward(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, T, D] and k [B, G, T, D] turned, contiguous: as attention multiplies them."""
    return _turned(q, cos, sin, False), _turned(k, cos, sin, False)


def backward(
    dq: torch.Tensor, dk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of q and k, in memory as [B, T, H, D]: as the projections write them."""
    return _turned(dq, cos, sin, True), _turned(dk, cos, sin, True)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backwards: bool) -> torch.Tensor:
    B, H, T, D = x.shape
    y = x.new_empty(B, T, H, D).transpose(1, 2) if backwards else x.new_empty(B, H, T, D)
    library = native.library_for(x)
    if library is None:
        return y.copy_(_plain(x, cos[:, None], sin[:, None], backwards))
    x = x if x.stride(3) == 1 else x.contiguous()
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    getattr(library, f"artemis_rotary_{native.NAMES[x.dtype]}")(
        x.data_ptr(), *x.stride()[:3], cos.data_ptr(), sin.data_ptr(), y.data_ptr(),
        *y.stride()[:3], B, H, T, D, len(cos), backwards, torch.get_num_threads(),
    )  # fmt: skip
    return y


def _plain(x, cos, sin, backwards):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if backwards:
        first, second = (wide * sin).chunk(2, -1)
        return wide * cos + torch.cat((second, -first), -1)
    first, second = wide.chunk(2, -1)
    return wide * cos + torch.cat((-second, first), -1) * sin
