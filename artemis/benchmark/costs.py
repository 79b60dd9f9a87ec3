"""What an operation must compute and move, whoever runs it."""

from collections.abc import Mapping

from artemis_kernels import Cost

from .operations import Operation, Sizes

PASSES = ("forward", "backward", "both")


def cost(
    operation: Operation,
    sizes: Sizes,
    provider: str,
    forward: Cost,
    itemsize: int,
    held: int | None = None,
) -> Cost:
    """FLOPs and bytes of one forward and one backward; `forward` is what `explain` says of it.

    Backward: dX of the base, each thin product twice; dY and what the forward read are read once,
    dX and the adapter's gradients written once. `held`: bytes of a packed weight.
    """
    m, k, n, r = sizes
    has_weight = operation.name != "bottleneck_adapter"
    base = 2 * m * k * n * has_weight
    if provider == "bare":
        return Cost(2 * base, 2 * itemsize * (m * k + k * n + m * n))
    read = n if operation.name == "adapter_linear" else k  # by the adapter
    adapter = r * (read + n)
    weight = itemsize * k * n * has_weight if held is None else held
    moved = weight + itemsize * (m * n + 2 * m * k + 2 * adapter)
    return forward + Cost(base + 2 * (forward.flops - base), moved)


def cost_of_pass(
    operation: Operation,
    sizes: Sizes,
    provider: str,
    forward: Cost,
    itemsize: int,
    which: str,
    held: int | None = None,
) -> Cost:
    """The same for one of PASSES."""
    both = cost(operation, sizes, provider, forward, itemsize, held)
    if provider == "bare":
        forward = Cost(both.flops // 2, both.bytes // 2)
    if which == "both":
        return both
    if which == "forward":
        return forward
    return Cost(both.flops - forward.flops, both.bytes - forward.bytes)


def rates(
    needed: Cost, milliseconds: float, peaks: Mapping[str, float], peers: list[float]
) -> dict[str, float | None]:
    """Of a call: what it reached, and its time over the floor and over that of the best peer."""
    seconds = milliseconds / 1e3
    floor = max(needed.flops / peaks["gflops"], needed.bytes / peaks["gbs"]) / 1e9
    return {
        "gflops": needed.flops / seconds / 1e9, "gbs": needed.bytes / seconds / 1e9,
        "intensity": needed.flops / needed.bytes, "over_floor": seconds / floor,
        "over_best_peer": milliseconds / min(peers) if peers else None,
    }  # fmt: skip
