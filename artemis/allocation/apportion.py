"""How many units each module gets: whole numbers from scores, bounds and a budget."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction


@dataclass(frozen=True)
class Claim:
    """One module's claim: its score, what a unit of it costs, its bounds and its usual size."""

    score: float
    cost: int
    least: int
    most: int
    usual: int


def apportion(claims: Sequence[Claim], budget: int) -> list[int]:
    """Return sizes whose cost is at most `budget`, by Webster's method of apportionment.

    From its least size each module bids `score · usual / (size + 1/2)` for one more unit, and the
    highest bid that the rest of the budget can pay wins, equal ones in order of the smaller filled
    share and then of the module. So sizes are as near to proportional to `score · usual` as whole
    numbers and bounds allow, and equal scores give every module its usual size. What is left over
    is less than a unit of any module below its bound. Bounds win: below the cost of all least
    sizes, those are returned.
    """
    sizes = [claim.least for claim in claims]
    left = budget - sum(c.cost * size for c, size in zip(claims, sizes, strict=True))
    bids = [_bid(claim, claim.least, index) for index, claim in enumerate(claims)]
    heapq.heapify(bids)
    while bids:
        index = heapq.heappop(bids)[-1]
        claim = claims[index]
        # A unit that cannot be paid now never can: the rest of the budget only shrinks.
        if sizes[index] == claim.most or claim.cost > left:
            continue
        sizes[index] += 1
        left -= claim.cost
        heapq.heappush(bids, _bid(claim, sizes[index], index))
    return sizes


def _bid(claim: Claim, size: int, index: int) -> tuple[float, float, int]:
    """The smallest is the best."""
    return -claim.score * claim.usual / (size + 0.5), size / claim.usual, index


def apportion_by_kind(kinds: Sequence[str], claims: Sequence[Claim], budget: int) -> list[int]:
    """As `apportion`, each kind by itself with its own part of the budget.

    What the kinds leave over, less than a unit of each, is given out among all.
    """
    groups: dict[str, list[int]] = {}
    for index, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(index)
    members = [[claims[index] for index in group] for group in groups.values()]
    sizes = [0] * len(claims)
    for group, own, part in zip(groups.values(), members, parts(members, budget), strict=True):
        for index, size in zip(group, apportion(own, part), strict=True):
            sizes[index] = size
    begun = [replace(claim, least=size) for claim, size in zip(claims, sizes, strict=True)]
    return apportion(begun, budget)


def parts(kinds: Sequence[Sequence[Claim]], budget: int) -> list[int]:
    """What each kind may spend: in proportion to what it costs at its usual sizes, within bounds.

    What the bounds of one keep from its proportion goes to, or comes from, the others in theirs.
    """
    usual, least, most = (
        [sum(claim.cost * getattr(claim, name) for claim in kind) for kind in kinds]
        for name in ("usual", "least", "most")
    )
    found, free = [0] * len(kinds), set(range(len(kinds)))
    while free:
        rate = Fraction(budget, sum(usual[k] for k in free))
        within = {k: min(max(rate * usual[k], least[k]), most[k]) for k in free}
        # Minimums that ask for more than maximums give back are final, and the other way round.
        excess = sum(within.values()) - budget
        final = {k for k in free if excess * (within[k] - rate * usual[k]) > 0} or free
        for k in final:
            found[k] = int(within[k])
            budget -= found[k]
        free = free - final
    return found
