"""How many units each module gets: whole numbers from scores, bounds and a budget."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


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
