"""What no adapter can go below: the frozen base's own step, and the adapters' bare products."""

import functools
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

Product = tuple[torch.Tensor, torch.Tensor]  # the factors of one matrix product


def stop_gradients_before_attention(model: nn.Module) -> nn.Module:
    """Freeze a Llama so that a backward still reaches all that adapters on every layer would need.

    The outputs of the first layer's q, k and v projections become leaves: the gradient runs from
    the loss through each frozen product down to them and no further, and no weight gets one. That
    is the smallest backward under which adapters of all seven projections can learn.
    """
    model.requires_grad_(False)
    attention = model.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model


class Site(NamedTuple):
    """One adapted linear layer: kind "lora" or "bottleneck", its sizes, its rank or width.

    `needs_dx` is false where nothing below the layer learns.
    """

    kind: str
    in_features: int
    out_features: int
    size: int
    needs_dx: bool


def adapter_products(sites: Iterable[Site], tokens: int, dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that runs every matrix product of the adapters of one training step.

    Forward and backward, each as a bare `torch.mm` into a buffer of its own, in the orientation
    that a trial found faster, and the bottlenecks folded or plain, likewise. Activations,
    dropout, sums and scales are not in it.
    """
    calls = [_call(*product) for site in sites for product in _site_products(site, tokens, dtype)]

    def run() -> None:
        for call in calls:
            call()

    return run


def _site_products(site: Site, tokens: int, dtype: torch.dtype) -> list[Product]:
    x = torch.randn(tokens, site.in_features).to(dtype)
    dy = torch.randn(tokens, site.out_features).to(dtype)
    if site.kind == "lora":
        return _lora(x, dy, site.size, site.needs_dx)
    if _folding_is_faster(tokens, site, dtype):
        return _folded(x, dy, site.size)
    return _plain(x, dy, site.size)


def _lora(x: torch.Tensor, dy: torch.Tensor, rank: int, needs_dx: bool) -> list[Product]:
    """`x Aᵀ`, `s Bᵀ`, `dY B`, `dYᵀ s`, `dSᵀ x` and, where dX is asked for, `dS A`."""
    a, b, s = x.new_ones(rank, x.shape[1]), x.new_ones(dy.shape[1], rank), x.new_ones(len(x), rank)
    products = [(x, a.t()), (s, b.t()), (dy, b), (dy.t(), s), (s.t(), x)]
    return [*products, (s, a)] if needs_dx else products


def _plain(x: torch.Tensor, dy: torch.Tensor, width: int) -> list[Product]:
    """`y0 Dᵀ`, `h Uᵀ`, `dY U`, `dYᵀ h`, `dzᵀ y0`, `dz D` (dy stands in for y0, dz for h)."""
    down, up = dy.new_ones(width, dy.shape[1]), dy.new_ones(dy.shape[1], width)
    h = dy.new_ones(len(dy), width)
    return [(dy, down.t()), (h, up.t()), (dy, up), (dy.t(), h), (h.t(), dy), (h, down)]


def _folded(x: torch.Tensor, dy: torch.Tensor, width: int) -> list[Product]:
    """`D W`, `x Fᵀ`, `h Uᵀ`, `dY U`, `dYᵀ h`, `dzᵀ x`, `(dzᵀ x) Wᵀ`, `dz F`."""
    down, up = dy.new_ones(width, dy.shape[1]), dy.new_ones(dy.shape[1], width)
    f, h = x.new_ones(width, x.shape[1]), x.new_ones(len(x), width)
    weight = x.new_ones(dy.shape[1], x.shape[1])
    return [
        (down, weight), (x, f.t()), (h, up.t()), (dy, up), (dy.t(), h), (h.t(), x),
        (f, weight.t()), (h, f),
    ]  # fmt: skip


@functools.cache
def _folding_is_faster(tokens: int, site: Site, dtype: torch.dtype) -> bool:
    x = torch.randn(tokens, site.in_features).to(dtype)
    dy = torch.randn(tokens, site.out_features).to(dtype)
    folded, plain = (
        sum(_best(_call(*product)) for product in products)
        for products in (_folded(x, dy, site.size), _plain(x, dy, site.size))
    )
    return folded < plain


def _call(left: torch.Tensor, right: torch.Tensor) -> Callable[[], object]:
    """`left @ right`, or `(rightᵀ @ leftᵀ)ᵀ` where that is faster."""
    layouts = left.is_contiguous(), right.is_contiguous()
    if _turning_is_faster(left.shape, right.shape, layouts, left.dtype):
        return _into_buffer(right.t(), left.t())
    return _into_buffer(left, right)


@functools.cache
def _turning_is_faster(
    left_shape: torch.Size,
    right_shape: torch.Size,
    contiguous: tuple[bool, bool],
    dtype: torch.dtype,
) -> bool:
    left, right = (
        torch.randn(shape if straight else shape[::-1]).to(dtype)
        for shape, straight in zip((left_shape, right_shape), contiguous, strict=True)
    )
    left, right = left if contiguous[0] else left.t(), right if contiguous[1] else right.t()
    return _best(_into_buffer(right.t(), left.t())) < _best(_into_buffer(left, right))


def _into_buffer(left: torch.Tensor, right: torch.Tensor) -> Callable[[], object]:
    return partial(torch.mm, left, right, out=left.new_empty(left.shape[0], right.shape[1]))


def _best(function: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the fastest of several calls, the first not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
