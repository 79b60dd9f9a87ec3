"""Ranks that follow importance while training goes on."""

from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback

from ..allocation import RankAllocation, set_dynamic_rank_allocation
from ..errors import AdapterError
from ..importance import analyze_layer_importance


class RankAllocationCallback(TrainerCallback):
    """Scores the modules and gives them new ranks and widths every few optimizer steps.

    Tensors really change size, and the optimizer's state follows. Checkpoints hold the sizes, and
    a resumed run takes them up. For training in one process.

    Args:
        dataset: what importance is measured on; as for `analyze_layer_importance`.
        every: optimizer steps between two allocations.
        until: the last step at which ranks may change, so that training can settle; None: any but
            the very last of the run.
        analysis: further arguments of `analyze_layer_importance`.
        allocation: further arguments of `set_dynamic_rank_allocation`.
    """

    def __init__(
        self,
        dataset: Iterable[Any],
        every: int,
        until: int | None = None,
        *,
        analysis: dict[str, Any] | None = None,
        allocation: dict[str, Any] | None = None,
    ):
        for name, value in (("every", every), ("until", until)):
            absent = value is None and name == "until"
            if not absent and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise AdapterError(f"{name}: got {value!r}, allowed: an integer from 1")
        self.dataset, self.every, self.until = dataset, every, until
        self.analysis, self.allocation = analysis or {}, allocation or {}
        #: What each allocation did: (optimizer step, report).
        self.reports: list[tuple[int, RankAllocation]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:
            raise AdapterError(
                f"RankAllocationCallback: got {args.world_size} processes, allowed: one, since DDP"
                " keeps gradients of the old sizes"
            )

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        step, last = state.global_step, self.until or state.max_steps - 1
        if step % self.every or step > last:
            return
        scores = analyze_layer_importance(model, self.dataset, **self.analysis)
        options = {"verbose": False} | self.allocation
        report = set_dynamic_rank_allocation(model, scores, optimizer=optimizer, **options)
        self.reports.append((step, report))
