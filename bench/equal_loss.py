"""What compute does the hybrid take to the held-out loss that full fine-tuning reaches?

    python -m bench.equal_loss --out bench/results/equal_loss.jsonl    # ten minutes, two cores

The demo's base model, which learnt Python's sources, is adapted to English by full fine-tuning
(bf16 autocast) and by the default hybrid over its base in bf16 and in int8: one batch size, one
order of the data, and a learning rate that stays where it has risen to, so that every point of a
curve is the end of a run of that many steps. Each arm's rate is the one of three with the lowest
mean over its curve on text held out for that; its seeds are judged on other text. The hybrids
train for twice the steps of full fine-tuning. Steps are timed apart, in turns, so that what
slowed the training is in no figure. A run that was cut short goes on where the file ends.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import nn
from transformers import set_seed
from transformers.utils import logging

from artemis.benchmark import machine
from artemis.benchmark.arms import ARMS, TrainingStep
from artemis.benchmark.flops import training_flops
from artemis.benchmark.models import Architecture
from artemis.benchmark.records import Record, append, read
from artemis.benchmark.turns import Spread, interleaved
from artemis.cli.demo import corpus, stages
from artemis.cli.demo.recipe import Recipe, Workspace
from artemis.training import (
    TokenBlocks,
    Trainer,
    attention_for,
    cut_blocks,
    load_base,
    show_progress,
)

BASELINE, HYBRID = "full-autocast", "hybrid"
#: Arm -> the learning rates that its trials choose from.
RATES = {
    BASELINE: (2.5e-4, 5e-4, 1e-3),
    HYBRID: (2.5e-3, 5e-3, 1e-2),
    "hybrid-int8": (2.5e-3, 5e-3, 1e-2),
}
SEEDS, TRIAL_SEED = 2, 1000
CURVE, STEP = "equal-loss", "equal-loss-step"


@dataclass(frozen=True)
class Plan:
    """Steps of a trial, of full fine-tuning's runs and of the hybrids'; blocks of held-out text."""

    trial_steps: int = 60
    full_steps: int = 120
    hybrid_steps: int = 240
    every: int = 10  # steps between two evaluations
    warmup: int = 8  # steps in which the learning rate rises
    held_out_blocks: int = 64  # for the choice of rates, and as many others for judging
    rounds: int = 20  # timed

    def steps(self, arm: str, seed: int) -> int:
        """How long a run of `arm` is."""
        if seed == TRIAL_SEED:
            return self.trial_steps
        return self.full_steps if arm == BASELINE else self.hybrid_steps


class Study:
    """What `out` holds of the study, and measuring the rest, one record after the other."""

    def __init__(self, space: Workspace, out: Path, plan: Plan):
        self.space, self.out, self.plan = space, out, plan
        self.records = read(out) if out.exists() else []
        self._head: Record | None = None

    def save(self, record: Record) -> None:
        """Append a record, the first of a run under a head that says where and with what."""
        if self._head is None:
            facts = machine.facts()
            recipe, plan = asdict(self.space.recipe), asdict(self.plan)
            self._head = {"kind": "run", "run": facts["time"], **facts} | {
                "recipe": recipe, "plan": plan
            }  # fmt: skip
            append(self.out, [self._head])
        self.records.append({"run": self._head["run"], **record})
        append(self.out, self.records[-1:])

    def curves(self, seeds: int) -> None:
        """All trials, then all seeds, a seed at a time, so that a run cut short has whole seeds."""
        trials = [(arm, rate, TRIAL_SEED) for arm, rates in RATES.items() for rate in rates]
        for arm, rate, seed in trials:
            self._curve(arm, rate, seed)
        cells = [(arm, seed) for seed in range(seeds) for arm in RATES]
        for arm, seed in cells:
            self._curve(arm, chosen_rate(self.records, arm), seed)

    def _curve(self, arm: str, rate: float, seed: int) -> None:
        about = {"kind": CURVE, "arm": arm, "rate": rate, "seed": seed}
        about["steps"] = self.plan.steps(arm, seed)
        if not any(about.items() <= record.items() for record in self.records):
            self.save(about | {"curve": train(self.space, self.plan, arm, rate, seed)})

    def times(self) -> None:
        """A step of every arm, in turns, and its FLOPs; again where another machine measured."""
        own = machine.identity(machine.facts())
        heads = {r["run"]: r for r in self.records if r["kind"] == "run"}
        steps = [record for record in self.records if record["kind"] == STEP]
        if any(machine.identity(heads[record["run"]]) == own for record in steps):
            return
        recipe = self.space.recipe
        batch = self.space.training_data("new").blocks[: recipe.batch_size].long()
        taken = {
            arm: TrainingStep(
                _model(self.space, arm), batch, ARMS[arm].autocast, trainers_loss=True
            )
            for arm in RATES
        }
        for arm, ms in interleaved(taken, self.plan.rounds).items():
            flops = training_flops(arm, _sizes(recipe), recipe.batch_size, recipe.sequence_length)
            self.save({"kind": STEP, "arm": arm, "ms": Spread.of(ms).to_dict(), "flops": flops})


def chosen_rate(records: list[Record], arm: str) -> float | None:
    """The rate whose trial has the lowest mean over its curve; None until all trials are known."""
    trials = {
        record["rate"]: mean(loss for _, loss in record["curve"])
        for record in records
        if record.get("kind") == CURVE and record["arm"] == arm and record["seed"] == TRIAL_SEED
    }
    return min(RATES[arm], key=trials.get) if set(RATES[arm]) <= set(trials) else None


def train(
    space: Workspace, plan: Plan, arm: str, rate: float, seed: int
) -> list[tuple[int, float]]:
    """Adapt the base once: (steps, held-out loss in nats a byte), from 0 steps on."""
    set_seed(seed)
    model = _model(space, arm)
    steps = plan.steps(arm, seed)
    settings = space.recipe.training(space.directory, steps, rate)
    arguments = settings.arguments(autocast=ARMS[arm].autocast)
    arguments.lr_scheduler_type, arguments.warmup_steps = "constant_with_warmup", plan.warmup
    arguments.seed = arguments.data_seed = seed
    arguments.eval_strategy, arguments.eval_steps = "steps", plan.every
    arguments.eval_on_start = True
    held_out = held_out_text(space, plan, chooses=seed == TRIAL_SEED)
    trainer = Trainer(
        args=arguments, train_dataset=space.training_data("new"), eval_dataset=held_out
    )
    show_progress(trainer, f"{arm} at {rate:g}, seed {seed}")
    trainer.train(model)
    logs = trainer.state.log_history
    return [(log["step"], round(log["eval_loss"], 5)) for log in logs if "eval_loss" in log]


def held_out_text(space: Workspace, plan: Plan, chooses: bool) -> TokenBlocks:
    """Held-out English: blocks that learning rates are chosen by, or others, to judge by."""
    length = space.recipe.sequence_length
    blocks = cut_blocks(space.documents("new")[1], corpus.byte_pairs(), length).blocks
    first, second = blocks[: plan.held_out_blocks], blocks[plan.held_out_blocks :]
    return TokenBlocks(second[: plan.held_out_blocks] if chooses else first)


def _model(space: Workspace, arm: str) -> nn.Module:
    """The demo's base, held and adapted as the arm says, in training mode."""
    length = space.recipe.sequence_length
    attention = attention_for(torch.bfloat16, torch.device("cpu"), length)
    model, _ = load_base(str(space.base), ARMS[arm].dtype, attention)
    return ARMS[arm].adapt(model).train()


def _sizes(recipe: Recipe) -> Architecture:
    vocabulary = len(corpus.byte_pairs())
    return Architecture(
        recipe.hidden_size, recipe.intermediate_size, recipe.layers, vocabulary, recipe.heads
    )


PARTS: dict[str, Callable[[Study, int], None]] = {
    "curves": Study.curves,
    "times": lambda study, seeds: study.times(),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.equal_loss",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument(
        "--seeds", type=int, default=SEEDS, help="runs of each arm after its trials"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
        help="curves (any machine, busy or not) or times (an idle one); default: both",
    )  # fmt: skip
    parser.add_argument(
        "--directory", type=Path, default=Path("artemis-demo"), metavar="DIR",
        help="where the demo's base model is, or goes (default: %(default)s)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds: got {options.seeds}, allowed: an integer from 1")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    space = Workspace(options.directory, Recipe())
    space.directory.mkdir(parents=True, exist_ok=True)
    if not space.base_is_ready():
        stages.base(space)
    study = Study(space, options.out, Plan())
    for part in options.parts:
        PARTS[part](study, options.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
