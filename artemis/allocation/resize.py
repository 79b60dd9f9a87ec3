"""Giving the modules of a model other sizes: the bank's tensors shrink and grow for real.

Parameters stay the same objects, so an optimizer keeps them; their storage is new.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from ..layers.bank import AdapterBank, check_writable, initial, site_tensors
from ..layers.sites import Site
from .change import Change
from .optimizer import check_states, move_states
from .transform import Transform, permute, rotate


@torch.no_grad()
def resize(
    bank: AdapterBank, sizes: Mapping[str, int], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, float]:
    """Give each module of `bank` its size in `sizes`; return each one's relative error.

    New units start like fresh ones (A and down drawn, B and up zero); what is cut is what matters
    least over all modules that share it. Everything is worked out before anything changes.

    Raises `AdapterError` where the bank is held in 8 bits, or an optimizer's state cannot follow.
    """
    if all(site.spec.size == sizes[path] for path, site in bank.sites.items()):
        return dict.fromkeys(sizes, 0.0)
    check_writable(bank, "given other sizes")
    changes: list[Change] = []
    errors: dict[str, float] = {}
    for sites in _groups(bank):
        after = [sizes[site.spec.path] for site in sites]
        transform = (_lora if sites[0].spec.kind == "lora" else _bottleneck)(bank, sites, after)
        changes += _changes(bank, sites, after, transform.padded(max(after)))
        errors |= {
            site.spec.path: error for site, error in zip(sites, transform.errors, strict=True)
        }
    if optimizer is not None:
        check_states(optimizer, changes)
    values = [change.applied() for change in changes]
    bank.forget()  # what was worked out for inference holds the old tensors
    if optimizer is not None:
        move_states(optimizer, changes)
    for change, value in zip(changes, values, strict=True):
        _replace(change.parameter, value)
    for site in bank.sites.values():
        site.spec = replace(site.spec, size=sizes[site.spec.path])
        site.layout = site_tensors(site.spec, bank.config)
    return errors


def _replace(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Give it new storage; the object stays, so that optimizers and wrappers keep it.

    A graph that is still alive (a loss that somebody holds) keeps the node that gathers gradients
    of the old shape, and the next graph would use it again. torch drops it only where the dtype
    changes, so the dtype changes in between.
    """
    other = torch.float16 if value.dtype == torch.float32 else torch.float32
    parameter.grad = None
    parameter.data = value.new_empty(0, dtype=other)
    parameter.data = value


def _groups(bank: AdapterBank) -> list[list[Site]]:
    """The modules, together where they share tensors."""
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in bank.sites.values():
        role = "lora_a" if site.spec.kind == "lora" else "down"
        groups.setdefault((role, site.layout[role][0]), []).append(site)
    return list(groups.values())


def _gains(bank: AdapterBank, sites: list[Site]) -> list[float]:
    if not bank.config.shared_parameters:
        return [1.0] * len(sites)
    return [bank.gain[site.spec.own_key].item() for site in sites]


def _lora(bank: AdapterBank, sites: list[Site], sizes: list[int]) -> Transform:
    a = bank.lora_a[sites[0].layout["lora_a"][0]].detach()
    bs = [bank.lora_b[site.spec.own_key].detach() for site in sites]
    return rotate(a, bs, _gains(bank, sites), sizes)


def _bottleneck(bank: AdapterBank, sites: list[Site], sizes: list[int]) -> Transform:
    key = sites[0].layout["down"][0]
    down, up = bank.down[key].detach().double(), bank.up[key].detach().double()
    before = [site.spec.size for site in sites]
    reads = down.square().sum(1).expand(len(sites), -1).clone()
    if bank.config.adapter_bias:
        for row, site, size in zip(reads, sites, before, strict=True):
            row[:size] += bank.bias_down[site.spec.own_key].detach().double().square()
    strength = (reads.sqrt() * up.norm(dim=0)).cpu()
    return permute(strength, before, sizes, _gains(bank, sites))


def _changes(
    bank: AdapterBank, sites: list[Site], sizes: list[int], transform: Transform
) -> list[Change]:
    """The changes of a group's tensors: those that its modules share, then those of each."""
    rows, columns = transform.rows, transform.columns
    reads, writes = ("lora_a", "lora_b") if sites[0].spec.kind == "lora" else ("down", "up")
    read = getattr(bank, reads)[sites[0].layout[reads][0]]
    fresh = initial(reads, (rows.shape[0], read.shape[1]), bank.config.init)
    changes = [Change(read, 0, rows, columns, fresh)]
    if writes == "up":
        changes.append(Change(bank.up[sites[0].layout["up"][0]], 1, columns, rows))
    for site, size in zip(sites, sizes, strict=True):
        part = slice(size), slice(site.spec.size)
        if writes == "lora_b":
            b = bank.lora_b[site.spec.own_key]
            changes.append(Change(b, 1, columns[part], rows[part]))
        elif bank.config.adapter_bias:
            bias = bank.bias_down[site.spec.own_key]
            changes.append(Change(bias, 0, rows[part], columns[part]))
    return changes
