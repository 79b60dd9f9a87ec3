"""What the public functions of groups share: arguments by member, paths, and their costs."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from ..core import call, tuning
from ..core.device import Chip
from ..core.device import chip as chip_of
from ..core.tiling import Shape
from ..core.types import Choice, Cost

READ_ONCE = "x is read once for all"


def by_member(op: str, count: int, **lists: Sequence | None) -> Iterator[tuple]:
    """The values of each member, in the order of `lists`; a list that is None gives None to all.

    Raises ValueError where a list has another length, and for a group of no members.
    """
    if count == 0:
        raise ValueError(f"{op}: a group needs at least one member, got none")
    for name, values in lists.items():
        if values is not None and len(values) != count:
            raise ValueError(f"{op}: {name} must hold {count} values, got {len(values)}")
    none = (None,) * count
    return zip(*(none if values is None else values for values in lists.values()), strict=True)


def paths(op: str, plan: Callable[..., call.Path], calls: Iterable[tuple]) -> list[call.Path]:
    """The path of each member's own call `(arguments, options)`; errors say which member."""
    found = []
    for index, (arguments, options) in enumerate(calls):
        try:
            found.append(plan(*arguments, **options))
        except (ValueError, TypeError) as error:
            message = str(error).partition(": ")[2]
            raise type(error)(f"{op}: member {index}: {message}") from None
    return found


def why_apart(each: list[call.Path]) -> str | None:
    """Why members on these paths are computed one after the other, or None where they may join."""
    impls = {path.impl for path in each}
    if len(impls) > 1:
        return "the members take different paths"
    if impls == {"reference"}:
        return each[0].reason
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms no operator over lists of tensors"
    return None


def choice(
    op: str,
    each: list[call.Path],
    why_apart: str | None,
    costs: list[Cost],
    shared: Cost,
    what: str,
) -> Choice:
    """The `Choice` of a group; `shared` is what joining the members changes in their `costs`."""
    total = sum(costs, Cost(0, 0))
    total = total if why_apart is not None else total + shared
    return Choice(op, *path(each, why_apart, what), total)


def path(each: list[call.Path], why_apart: str | None, what: str) -> call.Path:
    """The path of a group; `what` is what joining comes down to."""
    strategies = " + ".join(path.strategy for path in each)
    impl = each[0].impl if len({path.impl for path in each}) == 1 else "mixed"
    if why_apart is not None:
        return call.Path(impl, f"each: {strategies}", why_apart)
    return call.Path(impl, f"joined: {strategies}", f"{each[0].reason}; {what}")


def outputs_of(x: torch.Tensor, ups: Sequence[torch.Tensor]) -> list[Shape]:
    """The outputs [rows, out] of members by their second factors [out, rank]."""
    rows, dtype = x.shape[:-1].numel(), call.compute_dtype(x)
    return [Shape(rows, up.shape[0], r=up.shape[1], dtype=dtype) for up in ups]


def joined(x: torch.Tensor, count: int) -> Cost:
    """What joining changes in the sum of the single costs: x is read once, not `count` times."""
    return Cost(0, -(count - 1) * x.numel() * call.compute_dtype(x).itemsize)


def launches(
    strategies: Sequence[str], outputs: Sequence[Shape], joined: bool, chip: Chip
) -> tuple[int, int]:
    """Kernels beside the base products, forward and backward, where members shrink x.

    A shrink of x and the sums over x of its backward (one launch and one more that adds its parts)
    are made once if joined; the gradients of each output [m, n] of rank r take two launches, or
    three where dY is read twice, and a vendor's product one that adds the low-rank term. One more
    where a shrink is cut into parts.
    """
    shrinks = 1 if joined else len(outputs)
    updates = ["vendor" in strategy for strategy in strategies]
    through_outputs = sum(2 if tuning.one_read(shape, chip) else 3 for shape in outputs)
    updates_back = updates[0] if joined else sum(updates)
    return shrinks + sum(updates), through_outputs + 2 * shrinks + updates_back


def told(strategies: Sequence[str], outputs: Sequence[Shape], place: torch.device | Chip) -> str:
    """What joining these members in kernels comes down to, for `explain`."""
    (ahead, back), alone = (
        launches(strategies, outputs, joined, chip_of(place)) for joined in (True, False)
    )
    return (
        f"{READ_ONCE}: beside the base products "
        f"{ahead} launches forward, {back} backward (single calls: {alone[0]}, {alone[1]})"
    )
