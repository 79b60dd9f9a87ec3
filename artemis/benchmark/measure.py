"""One operation on one layer, measured: everybody checked, then timed in turns."""

from collections.abc import Iterator

import torch

import artemis_kernels

from .costs import cost_of_pass, rates
from .inference import AtInference, weight_of
from .peers import PEERS
from .prepare import LEARN, More, Prepared, Work, leaves_of, prepare
from .records import Record
from .timer import Timer


def measure(
    work: Work,
    dtype: torch.dtype,
    device: torch.device,
    timer: Timer,
    peaks: Record,
    more: More | None = None,
    impl: str | None = None,
    failures: tuple[type[Exception], ...] = (RuntimeError,),
    compiles: bool = True,
) -> Iterator[Record]:
    """A row for every provider: verdict, times, rates, and ratios to floor and best peer.

    `more` to `compiles` are as in `prepare`.
    """
    ready = prepare(work, dtype, device, more, impl, failures, compiles)
    rows = ready.rows
    # A backward of what ran before it belongs to that stream, and cannot be captured on another.
    for name, times in timer.rows(ready.calls, graphs=work.which != "backward").items():
        rows[name] |= times
    choices = _choices(work, ready, impl)
    for name, choice in choices.items():
        rows[name] |= {"impl": choice.impl, "strategy": choice.strategy}
    timed = [rows[name]["ms"]["p50"] for name in PEERS if "ms" in rows.get(name, {})]
    for name, row in rows.items():
        if "ms" in row:
            choice = choices.get(name, choices["artemis"])
            weight = weight_of(name, ready.weights)
            needed = cost_of_pass(
                work.operation, work.sizes, name, choice.cost, dtype.itemsize, work.which,
                None if weight is None else weight.nbytes,
            )  # fmt: skip
            row |= rates(needed, row["ms"]["p50"], peaks, timed)
        yield {"provider": name, "what": f"{name} on {work.name}", **row}


def _choices(work: Work, ready: Prepared, impl: str | None) -> dict[str, artemis_kernels.Choice]:
    """What the public functions say of each of their calls."""
    given = {"scale": 1.0} | leaves_of(ready.tensors, work.which, LEARN)
    packed = {name: given | {"weight": weight} for name, weight in ready.weights.items()}
    choices = {
        name: artemis_kernels.explain(
            work.operation.name, **arguments, dropout_p=work.dropout, impl=impl
        )
        for name, arguments in {"artemis": given, **packed}.items()
    }
    frozen = {name: run for name, run in ready.ways.items() if isinstance(run, AtInference)}
    return choices | {name: run.choice(ready.tensors["x"]) for name, run in frozen.items()}
