"""The output head of an adapted model: its input in rows, its product, and whether it runs at all.

Some losses (Liger's, TRL's in pieces) multiply by the head's weight themselves and never call the
head: LoRA on it would neither compute nor train.
"""

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .. import architectures
from ..errors import AdapterError
from .adapted import has_own_forward
from .frozen_head import FrozenHead
from .sites import Site


def freeze_head(model: nn.Module) -> None:
    """Let the output head of `model` be a `FrozenHead`, where it is a plain layer; in place."""
    head = architectures.output_head(model)
    if type(head) is nn.Linear and not has_own_forward(head):
        head.__class__ = FrozenHead


def thaw_head(model: nn.Module) -> None:
    """Undo `freeze_head`, unless something set since goes on calling the head as it is."""
    head = architectures.output_head(model)
    if type(head) is FrozenHead and not has_own_forward(head):
        vars(head).pop("forward", None)  # the class's own at most
        head.__class__ = nn.Linear


def hang_hooks(model: nn.Module) -> tuple[RemovableHandle, ...]:
    """Hang what the output head of `model` needs; after its layers were adapted.

    Functions of this module, which pickle and follow a deepcopy.
    """
    head = architectures.output_head(model)
    if head is None:
        return ()
    hooks = [head.register_forward_pre_hook(_row_after_row)]
    if _site(head) is not None:
        hooks.append(head.register_forward_pre_hook(_note_call))
        hooks.append(model.register_forward_hook(_check_called))
    return tuple(hooks)


def _row_after_row(head: nn.Module, args: tuple) -> tuple | None:
    """A forward pre-hook: the head's input without gaps between its rows, in strides too.

    Generation hands over the last token's states alone, a view; for such a view torch multiplies
    by a weight that no longer trains in a batched product, and copies the whole weight for it.
    """
    if not args:
        return None  # called by keywords
    x, *rest = args
    return x.reshape(-1, x.shape[-1]).contiguous().view(x.shape), *rest


def _note_call(head: nn.Module, args: tuple) -> None:
    """A forward pre-hook: the head has its part in what trains.

    Never taken back: compiled, the note would be read and made anew, and copies of a model for
    several threads share it.
    """
    if torch.is_grad_enabled():
        _site(head).called = True


def _check_called(model: nn.Module, args: tuple, output: object) -> None:
    """A forward hook of the model: `AdapterError` where its head was passed over in training."""
    if not (model.training and torch.is_grad_enabled()):
        return
    site = _site(architectures.output_head(model))
    if site is not None and site.active and not site.called:
        raise AdapterError(
            f"{site.spec.path} was not called: this loss reads the output head's weight itself (as"
            " Liger's and TRL's losses in pieces do), so that the adapter on it neither computes"
            " nor trains; take another loss, or leave it out of target_modules"
        )


def _site(head: nn.Module | None) -> Site | None:
    """The adapter on the head, None where it has none (any more)."""
    return None if head is None else vars(head).get("adapter")
