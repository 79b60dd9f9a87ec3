"""Watching gradients pass: dY of every target, though no parameter of the model gets a gradient.

A forward hook puts an identity behind each target; its backward sees dY and, with the features u
that it kept, adds G = dYᵀ u to the target's moments. So nothing depends on what trains, nothing
vanishes while an adapter's B is zero, and one gradient is held at a time.
"""

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import numpy
import torch
from torch import nn

from ..config import HybridAdapterConfig
from ..layers.blocks import with_first
from ..modes import evaluating
from ..plan import SiteSpec
from .moments import Moments
from .readers import Reader, Reading


class _Watch(torch.autograd.Function):
    """The identity on `y`; its backward hands dY and `u` to `moments`."""

    @staticmethod
    def forward(ctx, y, u, token, moments):
        ctx.save_for_backward(u)
        ctx.moments = moments
        return y.clone()  # a model may change its copy in place

    @staticmethod
    def backward(ctx, dy):
        ctx.moments.add(*ctx.saved_tensors, dy)
        return dy, None, None, None


@contextmanager
def watched(
    model: nn.Module, sites: Iterable[SiteSpec], config: HybridAdapterConfig, reading: Reading
) -> Iterator[dict[str, Moments]]:
    """Within it, each backward adds to the moments of every site; then the model is as before.

    Inside, no parameter requires a gradient, the model is in evaluation mode, and all generators
    start from a fixed seed.
    """
    device = next(model.parameters()).device
    # What makes the watched outputs, and all that follows from them, require a gradient.
    token = torch.zeros((), device=device, requires_grad=True)
    found: dict[str, Moments] = {}
    with ExitStack() as stack:
        stack.enter_context(own_generators(device))
        stack.enter_context(evaluating(model))
        stack.enter_context(_frozen(model))
        for spec in sites:
            reader, features = reading(spec, config, device)
            found[spec.path] = Moments(spec.out_features, features, device)
            hook = _hook(found[spec.path], reader, token)
            module = model.get_submodule(spec.path)
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield found


def _hook(moments: Moments, reader: Reader, token: torch.Tensor):
    def watch(module, args, kwargs, output):
        y = output[0] if isinstance(output, tuple) else output
        with torch.no_grad():
            u = reader((*args, *kwargs.values())[0], y)
        moments.expect()
        y = _Watch.apply(y, u, token, moments)
        return with_first(output, y) if isinstance(output, tuple) else y

    return watch


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within it no parameter requires a gradient."""
    parameters = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in parameters:
            parameter.requires_grad_(required)


@contextmanager
def own_generators(device: torch.device) -> Iterator[None]:
    """Python's, numpy's and torch's generators start at 0, and go on afterwards as they were."""
    python, numpys = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            random.seed(0)
            numpy.random.seed(0)
            torch.manual_seed(0)
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numpys)
