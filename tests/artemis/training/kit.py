"""Short runs of the trainer on tiny models."""

from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback, set_seed

from artemis.training import TokenBlocks, Trainer, TrainingConfig
from tests.artemis.models import VOCABULARY, adapted, llama

LENGTH = 8
EXAMPLES = 8


def blocks(examples: int = EXAMPLES) -> TokenBlocks:
    """The same random tokens at each call."""
    generator = torch.Generator().manual_seed(3)
    return TokenBlocks(torch.randint(3, VOCABULARY, (examples, LENGTH), generator=generator))


def hybrid(**settings):
    """A Llama with a filled adapter that shares parameters, the same at each call."""
    set_seed(1)
    return adapted(llama(), **settings)


def settings(directory: Path, **changes) -> TrainingConfig:
    """Batches of two, so four optimizer steps make an epoch of `blocks()`."""
    values = dict(batch_size=2, max_steps=6, learning_rate=1e-2, warmup=0.2, logging_steps=1)
    return TrainingConfig(output_dir=str(directory), **values | changes)


def trainer_for(model, directory: Path, **changes) -> Trainer:
    return Trainer(model, settings(directory, **changes).arguments(), train_dataset=blocks())


def trained_state(model) -> dict[str, torch.Tensor]:
    """Copies of what trains."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal_states(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert got.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert not different


class Sentences(Dataset):
    """Random tokens with a class each."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(3, VOCABULARY, (6,), generator=generator)
        return {"input_ids": tokens, "labels": torch.tensor(index % 3)}


class GradientRecorder(TrainerCallback):
    """Keeps the gradients that the optimizer is about to use, one dictionary for each step."""

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )


class StopAfter(TrainerCallback):
    """Ends the run as Ctrl-C would, once so many optimizer steps are done."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.steps:
            raise KeyboardInterrupt
