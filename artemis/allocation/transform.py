"""How the tensors of one group change size: a pair of small matrices for all of them.

A group is the modules that share one A, or one down and up; an unshared module is a group of its
own. Its parameters meet in a product over its units: `B A` for LoRA, `up · act(down …)` for a
bottleneck. `rows` [new, old] is what multiplies A (down) from the left; `columns` [new, old] goes
with the other side, B → B columnsᵀ, such that nothing changes where nothing is cut:
columnsᵀ rows = 1. A gradient changes like the other side's parameter. A row of zeros is a new unit.

Each module uses the first units only, as many as its size, so a transform also orders the units.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Transform:
    """The matrices of a group, fp64, and the relative error of each module's product."""

    rows: torch.Tensor
    columns: torch.Tensor
    errors: list[float]

    def padded(self, size: int) -> "Transform":
        """With units added at the end up to `size`."""
        extra = size - self.rows.shape[0]
        if extra <= 0:
            return self
        zeros = self.rows.new_zeros(extra, self.rows.shape[1])
        return Transform(
            torch.cat([self.rows, zeros]), torch.cat([self.columns, zeros]), self.errors
        )


def selection(order: Sequence[int], old: int, errors: list[float]) -> Transform:
    """Keep the units `order` of `old`, in that order."""
    matrix = torch.eye(old, dtype=torch.float64)[list(order)]
    return Transform(matrix, matrix, errors)


def rotate(
    a: torch.Tensor, bs: Sequence[torch.Tensor], gains: Sequence[float], sizes: Sequence[int]
) -> Transform:
    """Return the transform of a LoRA group to `sizes` that loses least of all `gain · B A`.

    A = L Q with orthonormal rows Q, so ‖B A‖ = ‖B L‖. Positions get directions, eigenvectors of
    `Σ (B L)ᵀ B L` over the modules that have a stake in them, in two ways: from the last position
    backwards, the least to those that lose it; from the first forwards, the most to those that
    keep it. What loses less in total is taken. For one module both are the truncated singular
    value decomposition. Where no module loses anything, nothing is rotated.

    Args:
        a: [rank, in]. bs: [out, rank of the module] each. sizes: of the modules afterwards.
    """
    old, new = a.shape[0], max(sizes)
    if not any(b[:, size:].any() for b, size in zip(bs, sizes, strict=True)):
        return selection(range(min(old, new)), old, [0.0] * len(bs))
    a = a.double()
    q, r = torch.linalg.qr(a.t())
    lower = r.t()
    energies = []
    for b, gain in zip(bs, gains, strict=True):
        product = gain * b.double() @ lower[: b.shape[1]]
        energies.append(product.t() @ product)
    orders = _taken_from_the_end(energies, sizes), _given_from_the_front(energies, sizes)
    basis = min(orders, key=lambda order: sum(_lost(energies, sizes, order)))
    # The rows keep A's length, and with it the speed at which it learns.
    length = (a.norm() / old**0.5) or 1.0
    rows = length * basis.t() @ torch.linalg.pinv(lower)
    columns = basis.t() @ lower.t() / length
    errors = [
        (lost / energy.trace().item()) ** 0.5 if lost else 0.0
        for lost, energy in zip(_lost(energies, sizes, basis), energies, strict=True)
    ]
    return Transform(rows[:new], columns[:new], errors)


def _lost(
    energies: Sequence[torch.Tensor], sizes: Sequence[int], basis: torch.Tensor
) -> list[float]:
    """How much of each module's energy lies along the directions beyond its size."""
    return [
        (basis[:, size:] * (energy @ basis[:, size:])).sum().clamp(min=0).item()
        for energy, size in zip(energies, sizes, strict=True)
    ]


def _given_from_the_front(energies: Sequence[torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
    """As below, but chosen from the first position on, for the modules that will use each."""
    count = energies[0].shape[0]
    rest = torch.eye(count, dtype=torch.float64, device=energies[0].device)
    first, given = [], 0
    for bound in sorted({min(size, count) for size in sizes}):
        using = sum(e for e, size in zip(energies, sizes, strict=True) if size > given)
        vectors = torch.linalg.eigh(rest.t() @ using @ rest).eigenvectors.flip(1)
        first.append(rest @ vectors[:, : bound - given])
        rest, given = rest @ vectors[:, bound - given :], bound
    return torch.cat([*first, rest], dim=1)


def _taken_from_the_end(energies: Sequence[torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
    """An orthonormal basis [k, k], its columns in the order in which they should be kept."""
    count = energies[0].shape[0]
    rest = torch.eye(count, dtype=torch.float64, device=energies[0].device)
    last = []
    bounds = sorted({size for size in sizes if size < count}, reverse=True)
    for bound in bounds:
        losing = sum(e for e, size in zip(energies, sizes, strict=True) if size <= bound)
        vectors = torch.linalg.eigh(rest.t() @ losing @ rest).eigenvectors
        cut = rest.shape[1] - bound
        last.append(rest @ vectors[:, :cut].flip(1))
        rest = rest @ vectors[:, cut:].flip(1)
    vectors = torch.linalg.eigh(rest.t() @ sum(energies) @ rest).eigenvectors
    return torch.cat([rest @ vectors.flip(1), *reversed(last)], dim=1)


def permute(
    strength: torch.Tensor, before: Sequence[int], sizes: Sequence[int], gains: Sequence[float]
) -> Transform:
    """Return the transform of a bottleneck group to `sizes` that loses the weakest units.

    A module loses what it used and does not keep; where units are shared it also gains what others
    have trained, if it grows over their units. Both count as error. The order stays as it is where
    no module is cut.

    Args:
        strength: [modules, units], how much each unit can do in each module.
        before, sizes: of the modules, now and afterwards.
    """
    old, new = strength.shape[1], max(sizes)
    energy = strength.double().square() * torch.tensor(gains, dtype=torch.float64)[:, None].square()
    used = torch.arange(old)[None] < torch.tensor(before)[:, None]
    worth = torch.where(used, energy, -energy)
    order = list(range(old))
    if any(n < b for b, n in zip(before, sizes, strict=True)):
        rest, last = order, []
        for bound in sorted({size for size in sizes if size < old}, reverse=True):
            losing = torch.tensor([size <= bound for size in sizes])
            value = worth[losing].sum(0)
            rest = sorted(rest, key=lambda unit: -value[unit].item())
            rest, cut = sorted(rest[:bound]), rest[bound:]
            last = cut + last
        total = worth.sum(0)
        order = sorted(rest, key=lambda unit: -total[unit].item()) + last
    position = {unit: place for place, unit in enumerate(order)}
    places = torch.tensor([position[unit] for unit in range(old)])
    kept = places[None] < torch.tensor(sizes)[:, None]
    wrong = torch.where(used != kept, energy, 0.0).sum(1)
    whole = torch.where(used, energy, 0.0).sum(1)
    errors = [
        (w / t).sqrt().item() if t > 0 else float(w > 0) for w, t in zip(wrong, whole, strict=True)
    ]
    return selection(order[:new], old, errors)
