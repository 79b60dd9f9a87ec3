"""transformers' Trainer going on from a checkpoint: where it is, and what it says.

- it warns of arguments that the checkpoint outweighs, and of what that lacks (`resuming`);
- in data without a length it finds its place in a later pass, too;
- each pass has an order of its own, which the run that it goes on with had, too (`order`);
- where all steps are done it trains nothing.
"""

import sys
import warnings
from typing import Any

import transformers
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import has_length

from .checkpoints import saved_state
from .order import GroupedByLength, begin_pass
from .resuming import (
    begun_anew,
    kept_intervals,
    kept_rates,
    moved_place,
    place_in_stream,
    rates,
)


class ResumingTrainer(transformers.Trainer):
    """What of `artemis.training.Trainer` matters to a resumed run only."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return GroupedByLength(sampler, seed)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        place = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        endless = num_train_epochs == sys.maxsize  # the parent's sign of data without a length
        if resume_from_checkpoint is None or self.args.ignore_data_skip or not endless:
            return place
        passes, steps = place_in_stream(
            self.state, saved_state(resume_from_checkpoint)["max_steps"]
        )
        return passes, steps * self.args.gradient_accumulation_steps

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if resume_from_checkpoint is not None:
            sentences = kept_intervals(self.args, self.state)
            if has_length(train_dataloader):
                _, steps, *_, batches, _ = self.set_initial_training_values(
                    self.args, train_dataloader
                )
                sentences += moved_place(self.args, self.state, steps, batches)
            _warn(sentences)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        given = rates(self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            _warn(begun_anew(self.args, checkpoint))
        _warn(kept_rates(given, rates(self.optimizer)))

    def _run_epoch(self, model, epoch: int, train_dataloader, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed in an epoch, after the last step; the parent looks after a step only.
            self.control.should_training_stop = True
        else:
            begin_pass(train_dataloader, epoch)
            super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)


def _warn(sentences: list[str]) -> None:
    for sentence in sentences:
        warnings.warn(sentence, stacklevel=2)
