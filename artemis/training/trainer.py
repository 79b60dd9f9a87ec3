"""transformers' Trainer for models with a hybrid adapter.

What differs from the parent:
- the model may come late: `Trainer(args=..., train_dataset=...)`, then `trainer.train(model)`;
- a checkpoint holds the adapter, the optimizer, the scheduler, the random states and the trainer's
  state, never the base nor a tokenizer; resuming from it continues the run bit for bit on a CPU,
  and more than the parent is said and done for that (`resuming_trainer`);
- the orthogonality penalty is added once per optimizer step, whatever the accumulation;
- gains and biases of the adapter are not decayed;
- a causal language model's loss is read from its logits as they are stored (`lean_loss`);
- one process drives one GPU (several: `torchrun`), never `torch.nn.DataParallel`;
- an adapter or a head in 16 bits is trained, with a warning; what would be trained and not saved is
  an error; a packed base is not sent round by DDP;
- each call of `train` trains what the model has by then, a second adapter too;
- what is pushed to the Hub during a run holds the adapter;
- a checkpoint that cannot be written is an error that names it;
- with `cuda_graphs=True` steps are replayed as CUDA graphs (`graphs`).

A model without an adapter is trained and saved as transformers does it, so that full fine-tuning
and the hybrid can be compared under the same trainer.
"""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput
from transformers.training_args import ParallelMode

from ..allocation.resize import resize
from ..errors import AdapterError, listed
from ..layers.bank import find_bank
from ..layers.packed import packed_modules
from ..orthogonality import orthogonality_penalty
from ..saving.adapter_file import read_adapter
from ..saving.atomic import naming
from .checkpoints import complete_checkpoint, saved_state
from .config import TrainingConfig
from .graphs import StepGraphs, check_arguments, check_model
from .hub import lay_out
from .loss import lean_loss
from .optimizers import holds_others, resized, untrained
from .penalty import add_penalty_gradient, penalty_weight
from .readiness import check_checkpointing, check_ready, narrow_parts
from .resuming_trainer import ResumingTrainer
from .throughput import of_this_call


class Trainer(ResumingTrainer):
    """transformers' Trainer, whose checkpoints of a hybrid adapter hold the adapter only.

    `model` is optional: `train(model)` brings it. `args` defaults to `TrainingConfig`'s.
    `cuda_graphs` replays the forward, the loss and the backward of a micro-batch as a CUDA graph;
    where that cannot be, it raises `AdapterError`. Everything else is as in the parent, and is
    passed by keyword.
    """

    #: The last optimizer that was not given but made; see `_renew_optimizer`.
    _own_optimizer: torch.optim.Optimizer | None = None

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        model_init=None,
        cuda_graphs: bool = False,
        **kwargs: Any,
    ):
        if args is None:
            args = TrainingConfig().arguments()
        if cuda_graphs:
            check_arguments(args)
        self.step_graphs = StepGraphs() if cuda_graphs else None
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
                module that was replaced, or would get no gradient through reentrant checkpointing;
                something beside it and its heads trains; the optimizer given is one for other
                parameters; steps are to be CUDA graphs and cannot be.
            OSError: a checkpoint cannot be written; names it.
        """
        checkpoint = kwargs.pop("resume_from_checkpoint", None)
        if isinstance(model_or_checkpoint, nn.Module):
            self._adopt(model_or_checkpoint)
        elif model_or_checkpoint is not None:
            checkpoint = model_or_checkpoint
        self._require_model()
        if _hybrid(self.model):
            self._check_adapter()
        if self.step_graphs is not None:
            check_model(self.model)
        self._renew_optimizer()
        begun = 0
        if checkpoint:
            hybrid = _hybrid(self.model)
            checkpoint = complete_checkpoint(checkpoint, self.args.output_dir, hybrid)
            begun = saved_state(checkpoint)["global_step"]
        try:
            output = super().train(checkpoint or None, *args, **kwargs)
        finally:
            if self.step_graphs is not None:
                self.step_graphs.clear()
        # transformers 5.17 divides by the steps of the whole schedule; 5.23 keeps this attribute.
        old = not hasattr(self, "_initial_global_step")
        return of_this_call(output, begun, self.state.max_steps) if begun and old else output

    def _adopt(self, model: nn.Module) -> None:
        """Make `model` the trainer's model, keeping everything else that the user has set."""
        if model is self.model:
            return
        given = None if self.optimizer is self._own_optimizer else self.optimizer
        scheduler = None if self._created_lr_scheduler else self.lr_scheduler
        callbacks = self.callback_handler.callbacks
        more = {}
        if self.optimizer_cls_and_kwargs is not None:  # which Seq2SeqTrainer does not take
            more["optimizer_cls_and_kwargs"] = self.optimizer_cls_and_kwargs
        # A new callback would take the signal over from the one that is kept, and be dropped.
        on_signal, self.args.enable_jit_checkpoint = self.args.enable_jit_checkpoint, False
        try:
            # The parent reads signature, labels, loss and device from the model in its constructor,
            # and offers no other way to set one.
            super().__init__(
                model,
                self.args,
                data_collator=self.data_collator,
                train_dataset=self.train_dataset,
                eval_dataset=self.eval_dataset,
                processing_class=self.processing_class,
                compute_loss_func=self.compute_loss_func,
                compute_metrics=self.compute_metrics,
                optimizers=(given, scheduler),
                preprocess_logits_for_metrics=self.preprocess_logits_for_metrics,
                **more,
            )
        finally:
            self.args.enable_jit_checkpoint = on_signal
        self.callback_handler.callbacks = callbacks

    def _require_model(self) -> None:
        if isinstance(self.model, _NoModel):
            raise AdapterError(
                "the trainer has no model yet: pass one to Trainer(model=...) or to train(model)"
            )

    def _check_adapter(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise AdapterError("a hybrid adapter cannot be sharded by FSDP or DeepSpeed; use DDP")
        check_ready(self.model)
        if self.args.ddp_broadcast_buffers is None and any(packed_modules(self.model)):
            # DDP sends buffers round at every forward, and a packed base lies in buffers. The
            # accelerator has read the arguments already, and wraps the model by its handler.
            self.accelerator.ddp_handler.broadcast_buffers = False
        for sentence in narrow_parts(self.model, scaled=self.accelerator.scaler is not None):
            warnings.warn(sentence, stacklevel=3)  # attributed to who called train

    def _renew_optimizer(self) -> None:
        """Drop the optimizer of an earlier call where it is not of what trains now."""
        if self.optimizer is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return  # sharded, an optimizer holds pieces of parameters
        missing = untrained(self.optimizer, self.model)
        changed = resized(self.optimizer, self.model)
        if self.optimizer is self._own_optimizer and (missing or changed):
            self.optimizer = self.lr_scheduler = None  # the parent then makes them
            if self.args.parallel_mode == ParallelMode.DISTRIBUTED:
                # DDP averages the gradients of the parameters that there were when it wrapped.
                self.model_wrapped = self.model
        elif changed or (missing and holds_others(self.optimizer, self.model)):
            raise AdapterError(
                "the optimizer given to the trainer was made for other parameters than"
                f" {listed(missing or changed)}; give one made from what trains now, or none"
            )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._require_model()
        return super().evaluation_loop(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any):
        with lean_loss(self.model):
            return super().compute_loss(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        step = partial(super().training_step, model)
        if self.step_graphs is None:
            loss = step(inputs, num_items_in_batch)
        else:
            loss = self._graphed(step, model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            add_penalty_gradient(self.model, self.accelerator.scaler)
        return loss

    def _graphed(self, step, model, inputs, num_items_in_batch) -> torch.Tensor:
        """`step`, for which a replay stands in, and what it does outside the GPU."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # of optimizers that evaluate at other parameters
        # Where the loss is not counted by tokens, the parent divides it by the micro-batches.
        parts = self.current_gradient_accumulation_steps
        inputs = self._prepare_inputs(inputs)
        return self.step_graphs.step(step, model, inputs, num_items_in_batch, parts)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and penalty_weight(self.model):
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
        self._require_model()
        place = output_dir or self.args.output_dir
        if not _hybrid(self.model):
            with naming(place):
                super()._save(output_dir, state_dict)
        elif self.args.should_save:
            self.model.save_adapter_parameters(place)

    def _save_checkpoint(self, model, trial) -> None:
        # The state is written last and marks a checkpoint complete. One left from an earlier run in
        # the same place must not vouch for this save if it is cut short.
        step = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = Path(self._get_output_dir(trial), step)
        if self.args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        with naming(folder):
            super()._save_checkpoint(model, trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if _hybrid(self.model):
            lay_out(self, checkpoint_folder)
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        model = self.model if model is None else model
        if _hybrid(model):
            _load_adapter(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(self, *args: Any, **kwargs: Any):
        if _hybrid(self.model):
            check_checkpointing(self.model)  # which the parent has set up by now
        own = self.optimizer is None
        prepared = super()._prepare_for_training(*args, **kwargs)
        if own:
            self._own_optimizer = self.optimizer
        return prepared

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


def _load_adapter(model: nn.Module, path: str) -> None:
    """Load a checkpoint's adapter; its modules may have been given other sizes during the run."""
    bank, file = find_bank(model), read_adapter(path)
    sizes = {site.path: site.size for site in file.plan.sites}
    usual = [(config.lora_rank, config.adapter_size) for config in (bank.config, file.config)]
    if sizes.keys() == bank.sites.keys() and usual[0] == usual[1]:
        resize(bank, sizes)
    model.load_adapter_parameters(path)
