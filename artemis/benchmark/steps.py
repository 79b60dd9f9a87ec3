"""A step: one workload of one arm on one cell, and how it is built and run."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from . import accuracy
from .arms import ARMS, TrainingStep
from .compiling import compile_model
from .decoding import NEW_TOKENS, Token
from .memory import forget_peak, peak_memory
from .models import Cell, build, random_tokens

_GATE_SEQUENCES = 2  # of a part of a large model; small models are checked on their whole batch


class Step(NamedTuple):
    """One workload by one arm on one cell.

    `workload` is train, prefill, decode or memory, `arm` a name of `ARMS`; `compiled`: by
    `torch.compile`.
    """

    workload: str
    arm: str
    cell: Cell
    compiled: bool = False

    def __str__(self) -> str:
        cell, how = self.cell, ", compiled" if self.compiled else ""
        layers = "1 layer" if cell.layers == 1 else f"{cell.layers} layers"
        return (
            f"{self.workload} by {self.arm}{how}, {cell.model}: {layers}, a vocabulary of"
            f" {cell.vocabulary:,}, {cell.batch} × {cell.sequence:,} tokens"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON line."""
        cell = dataclasses.asdict(self.cell)
        mode = {"compiled": True} if self.compiled else {}
        return {"workload": self.workload, "arm": self.arm, **mode, **cell}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Step":
        """The step that a JSON line is about; its other values do not count."""
        cell = Cell(**{field.name: values[field.name] for field in dataclasses.fields(Cell)})
        return cls(values["workload"], values["arm"], cell, values.get("compiled", False))

    @property
    def estimated_bytes(self) -> float:
        """About how much memory it takes: what the base's weights cost, and activations."""
        arm = ARMS[self.arm]
        return _needed(self.workload, self.cell, arm.state_bytes, arm.dtype.itemsize)

    @property
    def reference_bytes(self) -> float:
        """About how much more the gate takes for a while: the reference in the wider precision."""
        cell, size = self.cell, accuracy.WIDER[ARMS[self.arm].dtype].itemsize
        if not cell.whole:
            cell = dataclasses.replace(cell, batch=min(cell.batch, _GATE_SEQUENCES))
        return _needed(self.workload, cell, size, size)


def _needed(workload: str, cell: Cell, state_bytes: float, size: int) -> float:
    """Bytes, where a weight costs `state_bytes` in training, and all numbers have `size`."""
    sizes = cell.architecture
    if workload in ("prefill", "decode"):
        return sizes.parameters * size + cell.tokens * sizes.hidden * 64
    a_token = sizes.layers * (12 * sizes.hidden + 5 * sizes.intermediate) * size
    return sizes.parameters * state_bytes + cell.tokens * (a_token + 14 * sizes.vocabulary)


class Prepared(NamedTuple):
    """`run` does `count` pieces of what is timed; `step` is its model, batch and optimizer."""

    run: Callable[[], object]
    count: int
    step: TrainingStep


def prepare(step: Step) -> Prepared:
    """Build the model, adapt it, and say what a round runs."""
    training = _training_step(step)
    accuracy.fill_zeros(training.model)
    if step.workload in ("train", "memory"):
        return Prepared(training, 1, training)
    training.model.eval()
    if step.workload == "prefill":
        return Prepared(lambda: _prefill(training), 1, training)
    return Prepared(Token(training).run, NEW_TOKENS, training)


def _training_step(step: Step, reference: bool = False) -> TrainingStep:
    arm, cell = ARMS[step.arm], step.cell
    compiled = step.compiled and not reference
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = build(cell.architecture, arm.dtype, cell.sequence + NEW_TOKENS)
        if not cell.whole and not arm.is_full:
            _let_gradients_reach(model, compiled)
        adapt = arm.reference if reference else arm.adapt
        batch = random_tokens(cell.vocabulary, cell.batch, cell.sequence).to(device)
        adapted = adapt(model)
    if compiled:
        compile_model(adapted)
    # The reference's loss is transformers', so that the gate judges ours as well.
    return TrainingStep(adapted, batch, arm.autocast, arm.trainers_loss and not reference)


def _let_gradients_reach(model: PreTrainedModel, compiled: bool) -> None:
    """Let the backward go on to what the first layer reads, as it would to a layer below."""
    embeddings = model.get_input_embeddings()
    if compiled:  # a compiled backward leaves out what no leaf's gradient is made of
        leaf = torch.zeros((), dtype=model.dtype, requires_grad=True)
        embeddings.register_forward_hook(partial(_add_leaf, leaf))
    else:
        embeddings.register_forward_hook(_require_gradient)


def _require_gradient(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()


def _add_leaf(
    leaf: torch.Tensor, module: torch.nn.Module, args: tuple, output: torch.Tensor
) -> torch.Tensor:
    return output + leaf


def check(step: Step, prepared: Prepared) -> accuracy.Verdict:
    """Hold an adapted model to its references: its gradients, or its logits where it only infers.

    What is checked is what will be timed; its batch may be cut short.
    """
    arm, training = ARMS[step.arm], prepared.step
    whole_batch = training.batch
    if not step.cell.whole:
        training.batch = whole_batch[:_GATE_SEQUENCES]
    infers = step.workload in ("prefill", "decode")
    try:
        return accuracy.check(
            training,
            lambda: _training_step(step, reference=True),
            arm.dtype,
            arm.masks,
            arm.tolerance,
            accuracy.logits if infers else accuracy.gradients,
        )
    finally:
        training.batch = whole_batch
        training.model.train(not infers)


def _prefill(training: TrainingStep) -> None:
    """Read the prompt."""
    with torch.inference_mode():
        training.model(input_ids=training.batch, use_cache=True, logits_to_keep=1)


def measure_memory(step: Step) -> dict[str, int]:
    """Bytes of two training steps, to be run in a process of its own.

    `states`: weights, gradients and optimizer; `peak`: the most that the steps took at once beyond
    what the process held before the model; the rest of it is activations and temporaries.
    """
    tiny = Cell("64x1", 1, 64, 1, 16, step.cell.whole)
    prepare(step._replace(cell=tiny)).run()  # libraries load what they need at their first use
    before = forget_peak()
    prepared = prepare(step)
    forget_peak()
    for _ in range(2):
        prepared.run()
    return {"states": prepared.step.state_bytes, "peak": peak_memory() - before}
