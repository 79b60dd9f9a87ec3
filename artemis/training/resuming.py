"""What of a checkpoint outweighs the arguments of the run that goes on from it, in sentences.

transformers reads some settings back from a checkpoint and says so in a log at most.

| setting | a resumed run has it from |
| --- | --- |
| `learning_rate`, `weight_decay` | the checkpoint: they are the optimizer's, and the scheduler's |
| `logging_steps`, `eval_steps`, `save_steps` | the checkpoint: the trainer's state holds them |
| batch size, accumulation, data | the arguments, in whose batches what was seen is counted |
| `seed` | the arguments: the rest of a pass is of another order, and nothing tells it |
| whatever else | the arguments |

Nothing is said of what is the same, nor of steps that the arguments give no effect. What a
checkpoint lacks is named, too, with what begins anew for it.
"""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ..errors import listed

# The scheduler keeps the rate that was set beside the one of this step.
RATES = {"learning_rate": "initial_lr", "weight_decay": "weight_decay"}


def rates(optimizer: torch.optim.Optimizer) -> dict[str, list[Any]]:
    """What `RATES` names, of every group of parameters; None where a group has no such number."""
    groups = optimizer.param_groups
    return {name: [group.get(key) for group in groups] for name, key in RATES.items()}


def kept_rates(given: dict[str, list[Any]], loaded: dict[str, list[Any]]) -> list[str]:
    """Sentences on `rates` that loading a checkpoint has changed."""
    found = []
    for name in RATES:
        pairs = zip(given[name], loaded[name], strict=True)
        changed = [(new, old) for new, old in pairs if None not in (new, old) and new != old]
        if changed:
            new, old = (listed(dict.fromkeys(values)) for values in zip(*changed, strict=True))
            found.append(_kept(name, old, new))
    return found


def kept_intervals(args: TrainingArguments, state: TrainerState) -> list[str]:
    """Sentences on steps between logs, evaluations and saves that `state` has otherwise."""
    now = TrainerState()
    now.compute_steps(args, state.max_steps)
    found = []
    for kind in ("logging", "eval", "save"):
        name = f"{kind}_steps"
        new, old = getattr(now, name), getattr(state, name)
        if getattr(args, f"{kind}_strategy") == "steps" and new != old:
            found.append(_kept(name, old, new))
    return found


def moved_place(
    args: TrainingArguments, state: TrainerState, steps_per_epoch: int, batches_per_epoch: int
) -> list[str]:
    """A sentence where the steps of `state` are another share of the data than they were.

    transformers leaves out as many batches as these steps take now.
    """
    if args.ignore_data_skip:
        return []
    epochs, steps = divmod(state.global_step, steps_per_epoch)
    place = epochs + steps * args.gradient_accumulation_steps / batches_per_epoch
    if math.isclose(place, state.epoch):
        return []
    what = "are left out" if place > state.epoch else "are seen again"
    return [
        f"batch size, accumulation or data: the checkpoint has seen {state.epoch:.6g} epochs in"
        f" {state.global_step} steps (batches of {state.train_batch_size}), which are {place:.6g}"
        f" epochs with what is set now; that is used, and the examples between {what}"
    ]


def begun_anew(args: TrainingArguments, checkpoint: str) -> list[str]:
    """Sentences on states that a checkpoint lacks, where transformers goes on without a word."""
    several = args.world_size > 1
    random = f"rng_state_{args.process_index}.pth" if several else "rng_state.pth"
    # Without one of the first two the parent loads neither.
    both = "the optimizer and the schedule of the learning rate begin anew"
    anew = {OPTIMIZER_NAME: both, SCHEDULER_NAME: both, random: "dropout draws other masks"}
    return [
        f"{name}: missing in {checkpoint}, and so {what}"
        for name, what in anew.items()
        if not Path(checkpoint, name).is_file()
    ]


def place_in_stream(state: TrainerState, max_steps: int) -> tuple[int, int]:
    """Passes over data without a length that were finished, and optimizer steps in the next.

    transformers counts each pass as `max_steps` long, those of the run that saved `state`, and
    writes its place at the end of a step: a pass that has just been filled is not finished yet.
    """
    passes = max(math.ceil(state.epoch) - 1, 0)
    return passes, round((state.epoch - passes) * max_steps)


def _kept(name: str, old: Any, new: Any) -> str:
    return f"{name}: the checkpoint has {old}, which is kept; {new} is not used"
