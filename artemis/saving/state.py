"""What an adapter file holds of a model: its own tensors, adapter and heads."""

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import AdapterError, listed
from ..layers.bank import BANK, MERGED, find_bank
from ..layers.sources import is_at_hand


def adapter_state(model: nn.Module, heads: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """What an adapter file holds of `model.state_dict()`: the model's own tensors.

    A tensor that a head holds under several names is there under the first. `AdapterError` where
    one is sharded or offloaded.
    """
    bank = find_bank(model)
    state = {} if bank is None else dict(bank.state_dict(prefix=f"{BANK}."))
    state.pop(f"{BANK}.{MERGED}", None)  # says something of the base
    for head in heads:
        own = model.get_submodule(head).state_dict(prefix=f"{head}.", keep_vars=True)
        first = {id(tensor): name for name, tensor in reversed(own.items())}
        state.update((name, t) for name, t in own.items() if first[id(t)] == name)
    if away := [name for name, tensor in state.items() if not is_at_hand(tensor)]:
        raise AdapterError(
            f"{listed(away)}: sharded over processes, or offloaded; bring it back first (from FSDP:"
            " load the full state dict into such a model on one device)"
        )
    return state


@torch.no_grad()
def copy_tensors(
    model: nn.Module, heads: tuple[str, ...], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Copy checked tensors into the adapter and the heads of `model`."""
    for name, target in adapter_state(model, heads).items():
        target.copy_(tensors[name])
