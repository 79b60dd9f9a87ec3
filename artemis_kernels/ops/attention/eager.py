"""`attention` on a CPU: one pass where that serves (`whole.py`), else plain products of blocks of
queries, a compiled pass between them.

    forward    s = Q Kᵀ    p = softmax(scale·s)    Y = p V
    backward   s, p again    dV = pᵀ dY    dp = dY Vᵀ    ds = scale·p·(dp − Σ p·dp)
               dQ = ds K    dK = dsᵀ Q

A block of queries meets the keys up to its own: little of what `causal` hides is multiplied. Heads
that share keys are rows of one product. Kept for the backward, beside q, k and v: two fp32 numbers
a row. dK and dV of several blocks are added in fp32.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...core import native
from ...core.widened import at_least_fp32
from .whole import whole_pass

QUERIES = 128  # of a block


class Block(NamedTuple):
    """Queries [first, last), which see the first `keys` keys, and what they see of those."""

    first: int
    last: int
    keys: int
    batch: int
    mask: torch.Tensor | None
    causal: bool

    def numbers(self, rows: int) -> tuple:
        """For a compiled pass over all rows of the block."""
        seen = (None, 0, 0)
        if self.mask is not None:
            B, _, _, S = self.mask.shape
            seen = (self.mask.data_ptr(), self.mask.stride(0) if B > 1 else 0, S)
        queries = self.last - self.first
        return rows, self.keys, queries, self.first, rows // self.batch, *seen, self.causal

    def hide(self, scores: torch.Tensor, value: float) -> torch.Tensor:
        """Scores [groups, rows, keys] with those that are not seen replaced."""
        mask, T = self.mask, self.last - self.first
        if self.causal:
            shape = (1, 1, self.last, self.keys)
            mask = torch.ones(shape, dtype=torch.bool, device=scores.device).tril_()
        if mask is None:
            return scores
        mask = mask[:, :, self.first : self.last]
        by_batch = scores.view(self.batch, -1, T, self.keys)
        return by_batch.masked_fill_(~mask, value).view(scores.shape)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Y [B, H, T, E], in memory as [B, T, H, E], and what the backward needs, [blocks' rows, 2]."""
    B, H, T, _ = q.shape
    G, E = k.shape[1], v.shape[3]
    y = q.new_empty(B, T, H, E)
    kept = q.new_empty(B * H * T, 2, dtype=at_least_fp32(q.dtype))
    if (whole := whole_pass(q, k, v)) is not None:
        whole.forward(q, k, v, mask, scale, causal, y, kept)
        return y.transpose(1, 2), kept
    k, v = _of_groups(k), _of_groups(v)
    for block in _blocks(q, k.shape[1], mask, causal):
        scores = _queries(q, block, G) @ k[:, : block.keys].mT
        _softmax(scores, _rows(kept, block, B * H), block, scale)
        part, place = scores @ v[:, : block.keys], _place(y, block, G)
        place.copy_(part.view(place.shape))
    return y.transpose(1, 2), kept


def backward(
    dy: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    kept: torch.Tensor,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, in memory as [B, T, H, D]."""
    B, H, T, D = q.shape
    if (whole := whole_pass(q, k, v)) is not None:
        return whole.backward(dy, q, k, v, mask, kept, scale, causal)
    G, groups = k.shape[1], (_of_groups(k), _of_groups(v))
    dq = q.new_empty(B, T, H, D)
    sums = [_Sum(group) for group in groups]
    for block in _blocks(q, k.shape[2], mask, causal):
        keys, values = (group[:, : block.keys] for group in groups)
        queries, d = _queries(q, block, G), _queries(dy, block, G)
        p, ds = queries @ keys.mT, d @ values.mT
        _softmax_backward(p, ds, _rows(kept, block, B * H), block, scale)
        place = _place(dq, block, G)
        place.copy_((ds @ keys).view(place.shape))
        sums[0].add(ds.mT @ queries)
        sums[1].add(p.mT @ d)
    dk, dv = (_as_projected(each.total(), B, G) for each in sums)
    return dq.transpose(1, 2), dk, dv


class _Sum:
    """The sum of a gradient's parts [groups, keys, D], the first of which reaches furthest."""

    def __init__(self, like: torch.Tensor) -> None:
        self._like = like
        self._total = None

    def add(self, part: torch.Tensor) -> None:
        if self._total is None:  # of one block, nothing is added to it
            self._total = part
            return
        self._total = self._total.to(at_least_fp32(part.dtype))
        self._total[:, : part.shape[1]] += part

    def total(self) -> torch.Tensor:
        if self._total is None:
            return torch.zeros_like(self._like)
        return self._total.to(self._like.dtype)


def _blocks(q: torch.Tensor, keys: int, mask: torch.Tensor | None, causal: bool) -> Iterator[Block]:
    """The last first: it sees all keys."""
    B, _, T, _ = q.shape
    if B == 0:
        return
    for first in reversed(range(0, T, QUERIES)):
        last = min(first + QUERIES, T)
        yield Block(first, last, min(last, keys) if causal else keys, B, mask, causal)


def _of_groups(x: torch.Tensor) -> torch.Tensor:
    """[B, G, S, D] as [B·G, S, D], contiguous: else each product would copy it."""
    return x.contiguous().view(-1, *x.shape[2:])


def _queries(x: torch.Tensor, block: Block, groups: int) -> torch.Tensor:
    """Rows of a block, [B·G, H/G · queries, D]: heads that share keys in one matrix."""
    B, H, _, D = x.shape
    rows = H // groups * (block.last - block.first)
    return x[:, :, block.first : block.last].contiguous().view(B * groups, rows, D)


def _place(x: torch.Tensor, block: Block, groups: int) -> torch.Tensor:
    """The view of x [B, T, H, D] where a block's rows [B, G, H/G, queries, D] belong."""
    part = x[:, block.first : block.last]
    return part.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)


def _rows(kept: torch.Tensor, block: Block, heads: int) -> torch.Tensor:
    """What is kept of a block's rows: blocks lie one after the other."""
    return kept[heads * block.first : heads * block.last]


def _as_projected(x: torch.Tensor, batch: int, groups: int) -> torch.Tensor:
    """[B·G, S, D] as [B, G, S, D], in memory as [B, S, G, D]."""
    return x.view(batch, groups, *x.shape[1:]).transpose(1, 2).contiguous().transpose(1, 2)


def _softmax(scores: torch.Tensor, kept: torch.Tensor, block: Block, scale: float) -> None:
    """Scores become probabilities, in place."""
    library = native.library_for(scores)
    if library is None:
        wide = block.hide(scores.to(kept.dtype) * scale, float("-inf"))
        most = wide.amax(2, keepdim=True)
        most.masked_fill_(most == float("-inf"), 0)
        e = (wide - most).exp_()
        total = e.sum(2, keepdim=True)
        total.masked_fill_(total == 0, 1)
        scores.copy_(e.div_(total))
        kept.copy_(torch.cat((most, total.log()), 2).view(-1, 2))
        return
    getattr(library, f"artemis_softmax_forward_{native.NAMES[scores.dtype]}")(
        scores.data_ptr(), kept.data_ptr(), *block.numbers(len(kept)), scale,
        torch.get_num_threads(),
    )  # fmt: skip


def _softmax_backward(
    scores: torch.Tensor, dp: torch.Tensor, kept: torch.Tensor, block: Block, scale: float
) -> None:
    """Scores become probabilities, and dp their scores' gradient, in place."""
    library = native.library_for(scores)
    if library is None:
        most, log_sum = kept.view(*scores.shape[:2], 2).split(1, 2)
        p = (scores.to(kept.dtype) * scale).sub_(most).sub_(log_sum).exp_()
        p, wide = block.hide(p, 0.0), dp.to(kept.dtype)
        dp.copy_(p * (wide - (p * wide).sum(2, keepdim=True)) * scale)
        scores.copy_(p)
        return
    getattr(library, f"artemis_softmax_backward_{native.NAMES[scores.dtype]}")(
        scores.data_ptr(), dp.data_ptr(), kept.data_ptr(), *block.numbers(len(kept)), scale,
        torch.get_num_threads(),
    )  # fmt: skip
