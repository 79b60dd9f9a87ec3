"""Which tiles a strategy looks up: the kernels of its fused path, and the shapes they work on.

A second telling of what `ops` do, without triton and without running anything; a test holds it to
what every strategy of every operation really asks for.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from ..core import tuning
from ..core.device import Chip
from ..core.packed_choice import PRODUCTS
from ..core.strategies import FROZEN, TENSOR, Case, candidates
from ..core.tiling import Shape

Lookup = tuple[str, Shape]  # a kernel, a key of `tiling.HEURISTICS`, and the shape


def of_calls(calls: Iterable[Sequence[Case]], chip: Chip) -> list[Lookup]:
    """Those of every way to make the calls on a chip, once each.

    A call is one case, or those of a group's members, whose single calls count too.
    """
    found: dict[Lookup, None] = {}
    for members in calls:
        for call in (*((case,) for case in members), members):
            for strategies in product(*(candidates(case, chip) for case in call)):
                found |= dict.fromkeys(of_call(call, strategies, chip))
    return list(found)


def of_call(members: Sequence[Case], strategies: Sequence[str], chip: Chip) -> list[Lookup]:
    """Those of one call, once each; members of a group that do not join make their own."""
    pairs = list(zip(members, strategies, strict=True))
    together = len(pairs) > 1 and "one_pass" not in strategies
    joined = [pair for pair in pairs if together and not pair[1].startswith("plain")]
    apart = [pair for pair in pairs if pair not in joined]
    looks = (look for pair in apart for look in of_strategy(*pair, chip))
    return list(dict.fromkeys((*looks, *_joined(joined, chip))))


def of_strategy(case: Case, strategy: str, chip: Chip) -> list[Lookup]:
    """Those of one strategy, once each; with those of its backward if the case trains."""
    looks = {
        "lora_linear": _lora_linear,
        "adapter_linear": _adapter_linear,
        "bottleneck_adapter": _bottleneck_adapter,
        "quantized_linear": _quantized_linear,
    }.get(case.op, _frozen_linear)
    return list(dict.fromkeys(looks(case, strategy, chip)))


def _lora_linear(case: Case, strategy: str, chip: Chip) -> Iterator[Lookup]:
    _, m, k, n, r = case[:5]
    dtype = case.torch_dtype
    if strategy == "one_pass":
        yield "one_pass", Shape(m, n, k, r, dtype)
    else:
        yield _shrunk(case, Shape(m, k=k, r=r, dtype=dtype, masked=case.drops))
        yield from _base(case, strategy, chip, r)
    if case.trains:
        yield from _hidden_gradient(case, chip)
        yield "shrink_backward", Shape(m, k=k, r=r, dtype=dtype, masked=case.drops)
        yield from _base(case, strategy, chip, r, back=True)


def _adapter_linear(case: Case, strategy: str, chip: Chip) -> Iterator[Lookup]:
    _, m, k, n, r = case[:5]
    dtype = case.torch_dtype
    if strategy.startswith("plain"):
        yield from _base(case, strategy, chip, 0)
        for trains in (False, True)[: 1 + case.trains]:
            alone = case._replace(op="bottleneck_adapter", in_features=0, trains=trains)
            how, _ = tuning.choose_bottleneck(Shape(m, k=n, r=r, dtype=dtype), trains, chip)
            yield from _bottleneck_adapter(alone, how, chip)
        if case.trains:
            yield from _base(case, strategy, chip, 0, back=True)
        return
    yield from _dense(case)
    yield _shrunk(case, Shape(m, k=k, r=r, dtype=dtype))
    yield from _base(case, strategy, chip, r)
    if case.trains:
        yield from _hidden_gradient(case, chip)
        yield "shrink_backward", Shape(m, k=k, r=r, dtype=dtype)
        yield from _base(case, strategy, chip, r, back=True)


def _bottleneck_adapter(case: Case, strategy: str, chip: Chip) -> Iterator[Lookup]:
    m, hidden, r = case.rows, case.out_features, case.width
    across = Shape(m, k=hidden, r=r, dtype=case.torch_dtype)
    update = Shape(m, hidden, r=r, dtype=case.torch_dtype)
    if strategy == "row_block":
        yield "row_block", across
    else:
        yield _shrunk(case, across)
        yield "update", update
    if not case.trains:
        return
    if strategy == "two_launch_one_read":
        yield "expand_backward", update
        yield "shrink_backward", across
    else:
        if strategy == "two_launch":
            yield "shrink", across  # dz
        yield "weight_gradients", across


def _quantized_linear(case: Case, strategy: str, chip: Chip) -> Iterator[Lookup]:
    yield from _base(case, strategy, chip, 0)
    if case.trains:
        yield from _base(case, strategy, chip, 0, back=True)


def _frozen_linear(case: Case, strategy: str, chip: Chip) -> Iterator[Lookup]:
    _, m, k, n, r = case[:5]
    dtype = case.torch_dtype
    if strategy == "one_pass":
        yield "one_pass", Shape(m, n, k, r, dtype)
    elif case.op == FROZEN + "plain":
        yield from _base(case, strategy, chip, 0)
        yield _shrunk(case, Shape(m, k=n, r=r, dtype=dtype))
        yield "update", Shape(m, n, r=r, dtype=dtype)
    else:
        yield _shrunk(case, Shape(m, k=k, r=r, dtype=dtype))
        yield from _base(case, strategy, chip, r)


def _joined(pairs: Sequence[tuple[Case, str]], chip: Chip) -> Iterator[Lookup]:
    """Of members with low-rank terms of x: one shrink for all, one sum over x, one dX."""
    if not pairs:
        return
    first, folds = pairs[0][0], pairs[0][0].op == "adapter_linear"
    r = sum(case.width for case, _ in pairs)
    masked = first.drops and not folds
    across = Shape(first.rows, k=first.in_features, r=r, dtype=first.torch_dtype, masked=masked)
    yield _shrunk(first, across)
    for case, strategy in pairs:
        if folds:
            yield from _dense(case)
        yield from _base(case, strategy, chip, case.width)
    if not first.trains:
        return
    yield "shrink_backward", across
    for place, (case, strategy) in enumerate(pairs):
        yield from _hidden_gradient(case, chip)
        # The first product of dX takes the whole low-rank term along; the others are added to it.
        yield from _base(case, strategy, chip, 0 if place else r, back=True)


def output_of(case: Case) -> Shape:
    """Its output [rows, out] with a low-rank term of its width."""
    return Shape(case.rows, case.out_features, r=case.width, dtype=case.torch_dtype)


def _hidden_gradient(case: Case, chip: Chip) -> Iterator[Lookup]:
    """Of the gradient of the hidden matrix, and of what multiplied it, from dY."""
    output = output_of(case)
    if tuning.one_read(output, chip):
        yield "expand_backward", output
    else:
        across = Shape(output.m, k=output.n, r=output.r, dtype=output.dtype)
        yield "shrink", across
        yield "shrink_backward", across


def _base(case: Case, strategy: str, chip: Chip, r: int, back: bool = False) -> Iterator[Lookup]:
    """Of the base's product with a low-rank term of rank r; `back`: of dX."""
    _, m, k, n = case[:4]
    k, n = (n, k) if back else (k, n)
    dtype, vendor = case.torch_dtype, "vendor" in strategy
    # A mask over x falls on dX's low-rank term; the others', over h, on none.
    masked = back and r > 0 and case.drops and case.op == "lora_linear"
    how = next((how for how in PRODUCTS if strategy.endswith(how)), TENSOR)
    whole = Shape(m, n, k, r, dtype, masked)
    if how == "weight_only" and not back:
        kernel = "matvec" if tuning.walks_rows(whole) else "weight_only"
        yield f"{kernel}_{case.format}", whole
    elif how == TENSOR and r and not (vendor or back) and tuning.walks_rows(whole):
        yield "matvec_tensor", whole
    elif how in (TENSOR, "dense", "weight_only"):
        yield from _dense(case)
        if r and (vendor or tuning.draws_apart(whole, chip)):
            yield "update", Shape(m, n, r=r, dtype=dtype, masked=masked)
        elif r:
            yield "expand", whole
    else:
        yield f"round_rows_{how}", Shape(m, k, dtype=dtype)
        if back and chip.backend == "cuda":
            yield f"transpose_{how}", Shape(1, k, n)
        if vendor:
            yield f"finish_product_{how}", Shape(m, n, r=r, dtype=dtype, masked=masked)
        else:
            yield f"eight_bit_{how}", whole


def _shrunk(case: Case, shape: Shape) -> Lookup:
    """Of a shrink in the forward, whose dropout may fall on x or behind it."""
    few = tuning.walks_rows(Shape(shape.m, masked=case.drops))
    return "matvec_shrink" if few else "shrink", shape


def _dense(case: Case) -> Iterator[Lookup]:
    """Of a packed weight's dense copy."""
    if case.format != TENSOR:
        shape = Shape(1, case.out_features, case.in_features, dtype=case.torch_dtype)
        yield f"unpack_{case.format}", shape
