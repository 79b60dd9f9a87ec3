"""One study: which trials and cells it has, what is known of them, and measuring the rest.

The setting of a family (a learning rate; for the frozen base, its head's penalty) is chosen by
trials on a part of the training examples that is held out for it. A cell is one data set, arm and
seed; only cells see the test examples, and each sees them once.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import nn
from torch.nn import functional as F

from ..records import Record
from ..session import Session
from . import probe
from .arms import ARMS, FAMILIES, Arm
from .data import Examples, Task
from .model import Pretrained, outputs
from .training import Outcome, Recipe, train_and_test

_HELD_OUT, _HELD_OUT_SHARE = 1000, 0.2
#: A trial's share of the examples that a cell trains on, and its seed.
_TRIAL_SHARE, _TRIAL_SEED = 0.5, 0


@dataclass(frozen=True)
class Trial:
    """A setting of a family, to be judged on held-out training examples."""

    dataset: str
    family: str
    choice: float


@dataclass(frozen=True)
class Cell:
    """An arm with a seed, to be trained and tested."""

    dataset: str
    arm: str
    seed: int


@dataclass
class Study:
    """Measures what `session` does not know yet.

    `limit`: training examples of a cell, drawn by its seed; None: all.
    """

    session: Session
    pretrained: Pretrained
    tasks: dict[str, Task]
    recipe: Recipe
    limit: int | None
    arms: Sequence[str]
    seeds: int

    def __post_init__(self) -> None:
        self._features: dict[str, torch.Tensor] = {}
        self._heads: dict[tuple[str, int], nn.Linear] = {}
        self._data = {name: task.fingerprint for name, task in self.tasks.items()}

    @cached_property
    def setting(self) -> Record:
        """Equal for records that may stand in one table."""
        return {
            "model": self.pretrained.path.name,
            "files": self.pretrained.fingerprint,
            "precision": str(self.pretrained.dtype).removeprefix("torch."),
            "length": self.pretrained.length,
            "examples": self.limit,
            **asdict(self.recipe),
        }

    def about(self, job: Trial | Cell) -> Record:
        """Which job it is, on which model and data: equal for records of the same."""
        return {
            "kind": _kind(job),
            "setting": self.setting,
            "data": self._data[job.dataset],
            **asdict(job),
        }

    def jobs(self) -> list[Trial | Cell]:
        """All trials, then all cells, a seed at a time, so that a run cut short has whole seeds."""
        arms = {name: arm for name, arm in ARMS.items() if name in self.arms}
        families = dict.fromkeys(("head", *(arm.family for arm in arms.values())))
        trials = [
            Trial(dataset, family, choice)
            for family in families
            for dataset in self.tasks
            for choice in FAMILIES[family].trials
        ]
        cells = [
            Cell(dataset, arm, seed)
            for seed in range(self.seeds)
            for dataset in self.tasks
            for arm in arms
        ]
        return trials + cells

    def pending(self) -> Iterator[Trial | Cell]:
        """Jobs whose result is not known."""
        return (job for job in self.jobs() if self.find(job) is None)

    def find(self, job: Trial | Cell) -> Record | None:
        """What is known of a job; of a cell, with the setting that its family has by now."""
        wanted = self.about(job)
        if isinstance(job, Cell):
            wanted["choice"] = self.choice(job.dataset, ARMS[job.arm].family)
        for record in self.session.records:
            if all(record.get(key) == value for key, value in wanted.items()):
                return record
        return None

    def cells(self) -> list[Record]:
        """The records of all cells that are known."""
        found = [self.find(job) for job in self.jobs() if isinstance(job, Cell)]
        return [record for record in found if record is not None]

    def measure(self, job: Trial | Cell) -> None:
        """Run one job and save its record."""
        found = self._try(job) if isinstance(job, Trial) else self._run(job)
        self.session.save({**self.about(job), **found})

    def choice(self, dataset: str, family: str) -> float | None:
        """The setting with the highest held-out accuracy; of equal ones that of the lowest loss.

        None until all of the family's trials are known.
        """
        trials = [Trial(dataset, family, choice) for choice in FAMILIES[family].trials]
        found = [self.find(trial) for trial in trials]
        if None in found:
            return None
        return max(found, key=lambda record: (record["accuracy"], -record["loss"]))["choice"]

    def _try(self, trial: Trial) -> Record:
        task = self.tasks[trial.dataset]
        train, held_out = self._parts(task)
        if trial.family == "head":  # at the size of a cell: cheap, and penalties depend on it
            train = _drawn(train, self._count(task, 1.0), _TRIAL_SEED)
            head = probe.fit(*self._known(task, train), task.classes, trial.choice)
            logits = head(self._known(task, held_out)[0]).detach()
            return _score(logits, held_out.labels)
        arm = next(a for a in ARMS.values() if a.family == trial.family and a.trial)
        train = _drawn(train, self._count(task, _TRIAL_SHARE), _TRIAL_SEED)
        outcome = self._train(task, arm, trial.choice, _TRIAL_SEED, train, held_out)
        return {**_score(outcome.logits, held_out.labels), "seconds": round(outcome.seconds, 2)}

    def _run(self, cell: Cell) -> Record:
        task, arm = self.tasks[cell.dataset], ARMS[cell.arm]
        choice = self.choice(cell.dataset, arm.family)
        train = _drawn(task.train, self._count(task, 1.0), cell.seed)
        outcome = self._train(task, arm, choice, cell.seed, train, task.test)
        wrong = (outcome.logits.argmax(1) != task.test.labels).nonzero().flatten()
        return {
            **_score(outcome.logits, task.test.labels),
            "choice": choice,
            "items": len(task.test),
            "wrong": wrong.tolist(),
            "trained_on": len(train),
            "steps": outcome.steps,
            "seconds": round(outcome.seconds, 2),
            "trained_parameters": outcome.trained_parameters,
            "peak_memory": outcome.peak_memory,
            "sizes": outcome.sizes,
        }

    def _train(
        self, task: Task, arm: Arm, choice: float, seed: int, train: Examples, test: Examples
    ) -> Outcome:
        head = self._head(task, train, seed)
        return train_and_test(
            self.pretrained, task, arm, head, choice, seed, self.recipe, train, test
        )

    def _head(self, task: Task, train: Examples, seed: int) -> nn.Linear:
        """The frozen arm's head for these examples, fitted once."""
        key = task.name, seed, len(train)
        if key not in self._heads:
            penalty = self.choice(task.name, "head")
            self._heads[key] = probe.fit(*self._known(task, train), task.classes, penalty)
        return self._heads[key]

    def _known(self, task: Task, part: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and labels of some training examples; features are computed once a task."""
        if task.name not in self._features:
            model = self.pretrained.classifier(task.classes, frozen=True)
            found = outputs(self.pretrained, model, task.train, task.pad, "features")
            self._features[task.name] = found
        return self._features[task.name][part.places], part.labels

    def _parts(self, task: Task) -> tuple[Examples, Examples]:
        return task.split(min(_HELD_OUT, round(_HELD_OUT_SHARE * len(task.train))))

    def _count(self, task: Task, share: float) -> int:
        return max(1, math.ceil(share * min(self.limit or len(task.train), len(task.train))))


def _kind(job: Trial | Cell) -> str:
    return "quality-trial" if isinstance(job, Trial) else "quality"


def _drawn(examples: Examples, count: int, seed: int) -> Examples:
    """`count` examples at random, or all where there are no more."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    return examples.take(order[:count])


def _score(logits: torch.Tensor, labels: torch.Tensor) -> Record:
    """Accuracy, and the mean loss in nats."""
    right = (logits.argmax(1) == labels).float().mean().item()
    return {
        "accuracy": round(right, 6),
        "loss": round(F.cross_entropy(logits, labels).item(), 5),
    }
