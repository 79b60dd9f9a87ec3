"""Tokens in the order of their experts, and back.

Both ways are gathers, and so are their gradients: every sum has one order, on a GPU as well, where
`index_add` has none.
"""

from typing import NamedTuple

import torch


class Routing(NamedTuple):
    """Which rows of the tokens, each taken as often as it chose an expert, go where."""

    #: [tokens · choices]: the pairs of a token and its choice in the order of their experts.
    order: torch.Tensor
    #: [tokens · choices]: where each pair is in that order.
    places: torch.Tensor
    #: Pairs of each expert, and last those of none: models number such one past the experts.
    counts: list[int]
    choices: int

    @classmethod
    def of(cls, chosen: torch.Tensor, experts: int) -> "Routing":
        """`chosen` [tokens, choices] holds numbers of experts."""
        pairs = chosen.reshape(-1).clamp(max=experts)
        order = torch.argsort(pairs, stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        counts = torch.bincount(pairs, minlength=experts + 1).tolist()
        return cls(order, places, counts, chosen.shape[-1])

    def rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [tokens, width] -> [tokens · choices, width], expert after expert."""
        return _Gather.apply(hidden, self.order // self.choices, self.places, self.choices)

    def sums(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Each token's rows, times weights [tokens, choices], added up: [tokens, width]."""
        rows = _Gather.apply(rows, self.places, self.order, 1)
        rows = rows.view(*weights.shape, rows.shape[-1])
        return (rows * weights[..., None]).sum(1)


class _Gather(torch.autograd.Function):
    """`rows[index]`; its gradient is gathered by `back`, then each `times` neighbours are added."""

    @staticmethod
    def forward(ctx, rows, index, back, times):
        ctx.save_for_backward(back)
        ctx.times = times
        return rows[index]

    @staticmethod
    def backward(ctx, gradient):
        (back,) = ctx.saved_tensors
        gradient = gradient[back]
        if ctx.times > 1:
            gradient = gradient.view(-1, ctx.times, gradient.shape[-1]).sum(1)
        return gradient, None, None, None
