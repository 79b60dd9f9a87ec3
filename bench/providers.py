"""The arms of a training-step benchmark: each a way to train the same Llama on the same tokens."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from artemis.benchmark import arms
from artemis.benchmark.arms import TrainingStep

from .cases import Case, llama, tokens
from .floors import Site, adapter_products, stop_gradients_before_attention

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Arm(NamedTuple):
    """One provider. `build(case, dtype, **options)` returns what a round runs."""

    name: str
    precision: str
    what: str
    build: Callable[..., Callable[[], None]]

    @property
    def path(self) -> str:
        return f"{self.precision}/{self.name}"

    def make(self, case: Case, **options) -> Callable[[], None]:
        return self.build(case, PRECISIONS[self.precision], **options)


def full(case: Case, dtype: torch.dtype) -> TrainingStep:
    """Full fine-tuning, every tensor in `dtype`."""
    return TrainingStep(llama(case, dtype), tokens(case))


def full_autocast(case: Case, dtype: torch.dtype) -> TrainingStep:
    """Full fine-tuning, fp32 weights, gradients and states, products in bf16 by autocast."""
    return TrainingStep(llama(case, torch.float32), tokens(case), autocast=True)


def frozen(case: Case, dtype: torch.dtype) -> TrainingStep:
    """The floor of every adapter: see `stop_gradients_before_attention`."""
    return TrainingStep(stop_gradients_before_attention(llama(case, dtype)), tokens(case))


def peft_lora(case: Case, dtype: torch.dtype, dropout: float) -> TrainingStep:
    """PEFT's LoRA on all seven projections in its fastest setting: adapters in the base's dtype."""
    return TrainingStep(arms.peft_lora(llama(case, dtype), dropout), tokens(case))


def hybrid(case: Case, dtype: torch.dtype, **settings) -> TrainingStep:
    """The hybrid adapter; its defaults, but for `settings` of `HybridAdapterConfig`."""
    return TrainingStep(arms.hybrid(llama(case, dtype), **settings), tokens(case))


def artemis_lora(case: Case, dtype: torch.dtype, dropout: float, **settings) -> TrainingStep:
    """Artemis' LoRA on all seven projections, nothing shared between layers."""
    return TrainingStep(arms.lora(llama(case, dtype), dropout, **settings), tokens(case))


def hybrid_products(case: Case, dtype: torch.dtype) -> Callable[[], None]:
    """The matrix products of the default hybrid's adapters, bare: half of its own floor."""
    bank = hybrid(case, dtype).model.hybrid_adapter
    sites = [
        Site(spec.kind, spec.in_features, spec.out_features, spec.size, needs_dx=not _first(spec))
        for spec in bank.plan().sites
    ]
    return adapter_products(sites, case.tokens, dtype)


def _first(spec) -> bool:
    """Whether nothing that learns lies below this projection."""
    return ".layers.0.self_attn." in f".{spec.path}" and not spec.path.endswith("o_proj")


def _adapters(precision: str) -> list[Arm]:
    """The arms that both precisions have."""
    every = (
        ("floor", "frozen base: forward and dX only", frozen),
        ("peft", "PEFT LoRA, all linear", partial(peft_lora, dropout=0.0)),
        ("peft-dropout", "PEFT LoRA, dropout 0.1", partial(peft_lora, dropout=0.1)),
        ("lora", "Artemis LoRA, all linear", partial(artemis_lora, dropout=0.0)),
        ("lora-dropout", "Artemis LoRA, dropout 0.1", partial(artemis_lora, dropout=0.1)),
        ("hybrid", "default hybrid", hybrid),
        ("hybrid-unshared", "hybrid, nothing shared", partial(hybrid, shared_parameters=False)),
        ("products", "the hybrid's own products, bare", hybrid_products),
    )
    return [Arm(name, precision, what, build) for name, what, build in every]


ARMS = {
    arm.path: arm
    for arm in (
        Arm("full", "fp32", "full fine-tuning", full),
        *_adapters("fp32"),
        Arm("full-autocast", "bf16", "full fine-tuning, bf16 autocast", full_autocast),
        Arm("full", "bf16", "full fine-tuning, all bf16", full),
        *_adapters("bf16"),
    )
}
