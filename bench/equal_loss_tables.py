"""The tables of docs/benchmarks.md from what `python -m bench.equal_loss` wrote."""

from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

from artemis.benchmark.arms import ARMS
from artemis.benchmark.records import Record

from .equal_loss import BASELINE, CURVE, HYBRID, RATES, STEP, TRIAL_SEED, chosen_rate

Curve = Sequence[Sequence[float]]  # (steps, held-out loss), from 0 steps on
LEVELS = (0.25, 0.5, 0.75, 0.9, 1.0)
_ADAPTED = tuple(arm for arm in RATES if arm != BASELINE)


class Step(NamedTuple):
    """What a step of an arm costs."""

    ms: float
    flops: float


def curves(records: list[Record]) -> dict[str, dict[int, Curve]]:
    """Arm -> seed -> curve, at the rate that the arm's trials chose; seeds that all arms have."""
    found: dict[str, dict[int, Curve]] = {}
    for arm in RATES:
        rate = chosen_rate(records, arm)
        found[arm] = {
            record["seed"]: record["curve"]
            for record in records
            if record.get("kind") == CURVE and record["arm"] == arm and record["rate"] == rate
            if record["seed"] != TRIAL_SEED
        }
    common = set.intersection(*map(set, found.values()))
    return {arm: {seed: of[seed] for seed in sorted(common)} for arm, of in found.items()}


def costs(records: list[Record]) -> dict[str, Step]:
    """Arm -> what a step costs; the last measurement counts."""
    return {
        record["arm"]: Step(record["ms"]["p50"], record["flops"])
        for record in records
        if record.get("kind") == STEP
    }


def lowest(curve: Curve) -> float:
    """The least loss of a run."""
    return min(loss for _, loss in curve)


def steps_to(curve: Curve, level: float) -> float | None:
    """Steps until the loss is first at `level`, on straight lines; None where it never is."""
    before: Sequence[float] | None = None
    for point in curve:
        steps, loss = point
        if loss <= level:
            if before is None:
                return steps
            share = (before[1] - level) / (before[1] - loss)
            return before[0] + share * (steps - before[0])
        before = point
    return None


def table(records: list[Record]) -> str:
    """Steps, FLOPs and device-seconds to equal losses, of those of full fine-tuning."""
    known, step = curves(records), costs(records)
    if not known[BASELINE] or set(step) != set(RATES):
        return ""
    lines = [
        "| improvement | loss | full: steps | "
        + " | ".join(f"{ARMS[a].what}: steps | FLOPs | device-seconds" for a in _ADAPTED)
        + " |",
        "| --- | ---: | ---: |" + " ---: | ---: | ---: |" * len(_ADAPTED),
    ]
    for of, whose in ((HYBRID, "the hybrid's"), (BASELINE, "full's")):
        lines += [_row(known, step, of, whose, share) for share in LEVELS]
    return "\n".join([*lines, "", _notes(records, known, step), ""])


def _row(
    known: dict[str, dict[int, Curve]], step: dict[str, Step], of: str, whose: str, share: float
) -> str:
    levels = {
        seed: (1 - share) * curve[0][1] + share * lowest(known[of][seed])
        for seed, curve in known[BASELINE].items()
    }
    taken = {
        arm: {seed: steps_to(curve, levels[seed]) for seed, curve in runs.items()}
        for arm, runs in known.items()
    }
    cells = [f"{share:.0%} of {whose}", f"{mean(levels.values()):.3f}", _steps(taken[BASELINE])]
    for arm in _ADAPTED:
        ratios = [
            taken[arm][seed] / full if taken[arm][seed] is not None and full else None
            for seed, full in taken[BASELINE].items()
        ]
        cells.append(_steps(taken[arm]))
        for name in ("flops", "ms"):
            factor = getattr(step[arm], name) / getattr(step[BASELINE], name)
            cells.append(_ratios([None if ratio is None else ratio * factor for ratio in ratios]))
    return f"| {' | '.join(cells)} |"


def _steps(taken: dict[int, float | None]) -> str:
    reached = [steps for steps in taken.values() if steps is not None]
    if not reached:
        return "not reached"
    partly = "" if len(reached) == len(taken) else f" (in {len(reached)} of {len(taken)} seeds)"
    return f"{mean(reached):,.0f}{partly}"


def _ratios(found: list[float | None]) -> str:
    """Mean and range; nothing unless every seed has a figure."""
    if None in found:
        return ""
    return f"{mean(found):.0%} ({min(found):.0%}–{max(found):.0%})"


def _notes(records: list[Record], known: dict[str, dict[int, Curve]], step: dict[str, Step]) -> str:
    """What every arm trained with, and where all was measured."""
    last = next(record for record in reversed(records) if record.get("kind") == STEP)
    head = next(r for r in records if r.get("run") == last["run"] and "plan" in r)
    recipe = head["recipe"]
    lines = [_arm(arm, runs, chosen_rate(records, arm), step) for arm, runs in known.items()]
    setting = (
        f"Hidden {recipe['hidden_size']}, {recipe['layers']} layers,"
        f" {recipe['batch_size'] * recipe['sequence_length']:,} bytes a step,"
        f" {len(known[BASELINE])} seeds; steps timed in {head['plan']['rounds']} rounds."
        f" {head['processor']['name']}, {head['threads']} threads,"
        f" torch {head['versions']['torch']}, {head['time'][:10]}."
    )
    star = "\\* at an end of the rates that were tried"
    ends = f"\n\n{star}" if any("*" in line for line in lines) else ""
    return "\n".join([*lines, "", setting]) + ends


def _arm(arm: str, runs: dict[int, Curve], rate: float, step: dict[str, Step]) -> str:
    end = "\\*" if rate in (RATES[arm][0], RATES[arm][-1]) else ""
    (steps, _), *_ = (curve[-1] for curve in runs.values())
    flops = step[arm].flops / step[BASELINE].flops
    time = step[arm].ms / step[BASELINE].ms
    return (
        f"- {ARMS[arm].what}: rate {rate:g}{end}, {steps:,} steps, lowest loss"
        f" {mean(map(lowest, runs.values())):.3f}; a step {step[arm].ms:,.0f} ms ({time:.0%} of"
        f" full's), {flops:.0%} of its FLOPs"
    )
