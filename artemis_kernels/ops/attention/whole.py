"""All of attention in one compiled pass each way, over bf16: `native/attention_*.c`."""

import ctypes
from typing import NamedTuple

import torch

from ...core import native
from ...core.native import address

LARGEST = 256  # numbers of a head: its panels are to fit a cache
FEW_QUERIES = 7  # up to so many, keys and values are read as they lie; of more, in panels


class WholePass(NamedTuple):
    """The compiled passes; what they keep is laid out as `eager.py` has it."""

    library: ctypes.CDLL

    def forward(self, q, k, v, mask, scale, causal, y, kept) -> None:
        """Y [B, T, H, E] and kept, in place."""
        few = q.shape[2] <= FEW_QUERIES
        run = self.library.artemis_attention_few if few else self.library.artemis_attention_forward
        run(
            *_heads(q), *_heads(k), *_heads(v), address(y), address(kept), *_sizes(q, k, v),
            *_sight(mask, q), causal, scale, torch.get_num_threads(),
        )  # fmt: skip

    def backward(
        self, dy, q, k, v, mask, kept, scale, causal
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of q, k and v, in memory as [B, T, H, D]."""
        dy = dy if dy.stride(3) == 1 else dy.contiguous()
        found = tuple(x.new_empty(x.transpose(1, 2).shape) for x in (q, k, v))
        self.library.artemis_attention_backward(
            *_heads(dy), *_heads(q), *_heads(k), *_heads(v), address(kept), *map(address, found),
            *_sizes(q, k, v), *_sight(mask, q), causal, scale, torch.get_num_threads(),
        )  # fmt: skip
        return tuple(x.transpose(1, 2) for x in found)


def whole_pass(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> WholePass | None:
    """The pass over q [B, H, T, D], k and v; None where it does not serve.

    Heads that share keys are one thread's: with fewer of them there is no work for all.
    """
    if q.dtype != torch.bfloat16 or not q.is_cpu or not q.numel() or not v.numel():
        return None
    sizes = q.shape[3], v.shape[3]
    if any(size % 2 or size > LARGEST for size in sizes):
        return None
    if any(x.stride(3) != 1 for x in (q, k, v)):
        return None
    if k.shape[0] * k.shape[1] < torch.get_num_threads():
        return None
    library = native.over_bf16("attention")
    return None if library is None else WholePass(library)


def _heads(x: torch.Tensor) -> tuple[int, ...]:
    """Address and strides of x [batch, heads, rows, size]."""
    return x.data_ptr(), *x.stride()[:3]


def _sizes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[int, ...]:
    B, H, T, D = q.shape
    return B, H, k.shape[1], T, k.shape[2], D, v.shape[3]


def _sight(mask: torch.Tensor | None, q: torch.Tensor) -> tuple[int | None, int, int]:
    """Address of a mask [B or 1, 1, T, S], and its strides of batch and query."""
    if mask is None:
        return None, 0, 0
    return mask.data_ptr(), mask.stride(0) if len(mask) > 1 else 0, mask.shape[3]
