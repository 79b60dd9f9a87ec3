"""Running statistics of the frozen base: they stay as they are while the adapter trains.

A batch norm in training mode changes what it normalizes by at inference, and that is saved nowhere.
So such norms, outside the heads that train, stay in evaluation mode until the adapter is removed.
"""

from collections.abc import Iterator
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def hold_statistics(model: nn.Module, heads: tuple[str, ...]) -> None:
    """Keep the norms of `model` that have running statistics in evaluation mode, but for `heads`.

    By an attribute in place of the method `train`: a partial of a function of this module pickles
    and follows a deepcopy to the copy, over any subclass of torch's norms.
    """
    trained = {id(m) for head in heads for m in model.get_submodule(head).modules()}
    for norm in _with_statistics(model):
        if id(norm) not in trained:
            norm.eval()
            norm.train = partial(_stay, norm)


def release_statistics(model: nn.Module) -> None:
    """Undo `hold_statistics`: each norm is in the mode that its model is in."""
    for norm in _with_statistics(model):
        method = vars(norm).get("train")
        if isinstance(method, partial) and method.func is _stay:
            del norm.train
            norm.train(model.training)


def _with_statistics(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            yield module


def _stay(norm: nn.Module, mode: bool = True) -> nn.Module:
    """In place of `norm.train`: whatever `mode`, evaluation."""
    norm.training = False
    return norm
