"""transformers' Trainer for models with a hybrid adapter.

What differs from the parent:
- the model may come late: `Trainer(args=..., train_dataset=...)`, then `trainer.train(model)`;
- a checkpoint holds the adapter, the optimizer, the scheduler, the random states and the trainer's
  state, never the base; resuming from it continues the run bit for bit on a CPU, trains nothing
  where all steps are done, and warns of arguments that the checkpoint outweighs (`resuming`);
- the orthogonality penalty is added once per optimizer step, whatever the accumulation;
- gains and biases of the adapter are not decayed;
- a causal language model's loss is read from its logits as they are stored (`lean_loss`);
- one process drives one GPU (several: `torchrun`), never `torch.nn.DataParallel`;
- an adapter in 16 bits is trained, with a warning; a packed base is not sent round by DDP.

A model without an adapter is trained and saved as transformers does it, so that full fine-tuning
and the hybrid can be compared under the same trainer.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    EvalLoopOutput,
    TrainOutput,
    has_length,
)

from ..adapter_file import read_adapter
from ..allocation.resize import resize
from ..bank import check_writable, find_bank
from ..errors import AdapterError, listed
from ..layers import check_in_place
from ..merging import check_unmerged
from ..orthogonality import orthogonality_penalty
from ..quantized_layers import packed_layers
from .checkpoints import complete_checkpoint, saved_state
from .config import TrainingConfig
from .loss import lean_loss
from .resuming import kept_intervals, kept_rates, moved_place, rates


class Trainer(transformers.Trainer):
    """transformers' Trainer; `model` is optional, and `args` defaults to `TrainingConfig`'s.

    Everything else is as in the parent, and is passed by keyword.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        model_init=None,
        **kwargs: Any,
    ):
        if args is None:
            args = TrainingConfig().arguments()
        if args.n_gpu > 1:
            # The parent would wrap the model in DataParallel, whose replicas cannot share one bank.
            args._n_gpu = 1
        if model is None and model_init is None:
            model = _NoModel()
        super().__init__(model, args, model_init=model_init, **kwargs)

    def train(
        self, model_or_checkpoint: nn.Module | str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train a model, or the model that the trainer already has.

        Args:
            model_or_checkpoint: a module becomes the trainer's model. A path resumes from that
                checkpoint, True from the last complete one under `args.output_dir`.
            args, kwargs: as in the parent's `train`; `resume_from_checkpoint` may stand here
                beside a model.

        Returns:
            As in the parent's `train`; the loss and the rates are of this call's steps, and 0 where
            a checkpoint has all steps done.

        Raises:
            AdapterError: there is no model; the checkpoint is missing or incomplete; an adapter
                would be sharded (FSDP, DeepSpeed), is merged, is held in 8 bits, or acted on a
                module that was replaced.
        """
        checkpoint = kwargs.pop("resume_from_checkpoint", None)
        if isinstance(model_or_checkpoint, nn.Module):
            self._adopt(model_or_checkpoint)
        elif model_or_checkpoint is not None:
            checkpoint = model_or_checkpoint
        self._require_model()
        if _hybrid(self.model):
            self._check_adapter()
        begun = 0
        if checkpoint:
            checkpoint = complete_checkpoint(checkpoint, self.args.output_dir)
            begun = saved_state(checkpoint)["global_step"]
        output = super().train(checkpoint or None, *args, **kwargs)
        # transformers 5.17 divides by the steps of the whole schedule; 5.23 keeps this attribute.
        old = not hasattr(self, "_initial_global_step")
        return _of_this_call(output, begun, self.state.max_steps) if begun and old else output

    def _adopt(self, model: nn.Module) -> None:
        """Make `model` the trainer's model, keeping everything else that the user has set."""
        if model is self.model:
            return
        first = isinstance(self.model, _NoModel)
        callbacks = self.callback_handler.callbacks
        # The parent reads signature, labels, loss and device from the model in its constructor, and
        # offers no other way to set one.
        super().__init__(
            model,
            self.args,
            data_collator=self.data_collator,
            train_dataset=self.train_dataset,
            eval_dataset=self.eval_dataset,
            processing_class=self.processing_class,
            compute_loss_func=self.compute_loss_func,
            compute_metrics=self.compute_metrics,
            optimizers=(self.optimizer, self.lr_scheduler) if first else (None, None),
            optimizer_cls_and_kwargs=self.optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=self.preprocess_logits_for_metrics,
        )
        self.callback_handler.callbacks = callbacks

    def _require_model(self) -> None:
        if isinstance(self.model, _NoModel):
            raise AdapterError(
                "the trainer has no model yet: pass one to Trainer(model=...) or to train(model)"
            )

    def _check_adapter(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise AdapterError("a hybrid adapter cannot be sharded by FSDP or DeepSpeed; use DDP")
        check_unmerged(self.model)
        bank = find_bank(self.model)
        check_writable(bank, "trained")
        check_in_place(self.model, bank.sites.values())
        if self.args.ddp_broadcast_buffers is None and any(packed_layers(self.model)):
            # DDP sends buffers round at every forward, and a packed base lies in buffers. The
            # accelerator has read the arguments already, and wraps the model by its handler.
            self.accelerator.ddp_handler.broadcast_buffers = False
        narrow = {p.dtype for p in bank.parameters() if p.requires_grad and p.itemsize < 4}
        if narrow:
            # Attributed to who called train.
            warnings.warn(
                f"the adapter is held in {listed(narrow)}: an update smaller than half a step of"
                " that is lost; train it in float32 (adapter_bits=32, adapter_dtype: float32)",
                stacklevel=3,
            )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._require_model()
        return super().evaluation_loop(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any):
        with lean_loss(self.model):
            return super().compute_loss(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._add_orthogonality_gradient()
        return loss

    def _add_orthogonality_gradient(self) -> None:
        """Add the penalty's gradient to the accumulated ones, before clipping.

        `autograd.grad` runs no hooks, so under DDP the term is added after the gradients have been
        averaged, alike in every process. The reported loss stays the task's own.
        """
        weight = self._orthogonality_weight()
        if not weight:
            return
        parameters = [p for p in find_bank(self.model).parameters() if p.requires_grad]
        penalty = weight * orthogonality_penalty(self.model)
        if not penalty.requires_grad:
            return
        if self.accelerator.scaler is not None:
            # fp16: the accumulated gradients carry the scaler's factor until the optimizer steps.
            penalty = penalty * self.accelerator.scaler.get_scale()
        gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient.clone()
            else:
                parameter.grad.add_(gradient)

    def _orthogonality_weight(self) -> float:
        bank = find_bank(self.model)
        return 0.0 if bank is None else bank.config.orthogonality_weight

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._orthogonality_weight():
            with torch.no_grad():
                logs["orthogonality_penalty"] = orthogonality_penalty(self.model).item()
        super().log(logs, *args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        names = super().get_decay_parameter_names(model)
        if not _hybrid(self.model):
            return names
        # A gain rests at 1, not at 0, and the parent knows no names but "bias" and "norm".
        return [name for name in names if model.get_parameter(name).ndim > 1]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not _hybrid(self.model):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            self.model.save_adapter_parameters(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model, trial) -> None:
        # The state is written last and marks a checkpoint complete. One left from an earlier run in
        # the same place must not vouch for this save if it is cut short.
        if self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            state = Path(self._get_output_dir(trial), folder, TRAINER_STATE_NAME)
            state.unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        model = self.model if model is None else model
        if _hybrid(model):
            _load_adapter(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

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
        _warn(kept_rates(given, rates(self.optimizer)))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed in an epoch, after the last step; the parent looks after a step only.
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_best_model(self) -> None:
        if _hybrid(self.model):
            _load_adapter(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()


class _NoModel(nn.Module):
    """Stands in until `train(model)` brings the model; the parent's constructor demands one."""

    config = None


def _hybrid(model: nn.Module) -> bool:
    return find_bank(model) is not None


def _warn(sentences: list[str]) -> None:
    for sentence in sentences:
        warnings.warn(sentence, stacklevel=2)


def _load_adapter(model: nn.Module, path: str) -> None:
    """Load a checkpoint's adapter; its modules may have been given other sizes during the run."""
    bank, file = find_bank(model), read_adapter(path)
    sizes = {site.path: site.size for site in file.plan.sites}
    usual = [(config.lora_rank, config.adapter_size) for config in (bank.config, file.config)]
    if sizes.keys() == bank.sites.keys() and usual[0] == usual[1]:
        resize(bank, sizes)
    model.load_adapter_parameters(path)


def _of_this_call(output: TrainOutput, begun: int, max_steps: int) -> TrainOutput:
    """Loss and rates of the steps after `begun`, where they were divided by those of all."""
    steps = output.global_step - begun
    loss = output.training_loss * output.global_step / max(steps, 1)
    rates = ("train_samples_per_second", "train_steps_per_second")
    metrics = {
        name: value * steps / max_steps if name in rates else value
        for name, value in output.metrics.items()
    }
    return TrainOutput(output.global_step, loss, metrics | {"train_loss": loss})
