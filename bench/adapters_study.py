"""What do the orthogonality penalty, the start of A, sharing and ranks by importance give?

    python -m bench.adapters_study --out bench/results/adapters_study.jsonl   # minutes, one core

A byte-level Llama of four layers learns Python's standard library; each arm then adapts that same
base to the English of Python's help topics. An arm's learning rate is chosen, from as many trials
as any other's, by the loss on text held out for that; its seeds are judged on other text. A run
that was cut short goes on where the file ends.
"""

import argparse
import json
import statistics
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from artemis import (
    HybridAdapterConfig,
    add_hybrid_adapter_to_model,
    analyze_layer_importance,
    orthogonality_penalty,
    set_dynamic_rank_allocation,
)
from artemis.benchmark import machine
from artemis.benchmark.records import append
from artemis.cli.demo import corpus
from artemis.training import cut_blocks

LENGTH, BATCH, BASE_STEPS, STEPS, HELD_OUT = 64, 8, 250, 40, 32
TRIALS = (3e-3, 1e-2, 3e-2)
BASE_RATE, BASE_SEED, TRIAL_SEED = 2e-3, 0, 1000
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Arm:
    """A change of the default configuration; `within`: how ranks are allocated, "" for not."""

    part: str
    changes: dict[str, Any] = field(default_factory=dict)
    within: str | None = ""


def _penalty(form: str, weight: float) -> Arm:
    return Arm("orthogonality", {"orthogonality_form": form, "orthogonality_weight": weight})


def _only(names: tuple[str, ...], shared: bool) -> Arm:
    lora = names if names is ATTENTION else ()
    changes = {"target_modules": names, "apply_lora_to": lora, "shared_parameters": shared}
    return Arm("sharing", changes)


ARMS = {
    "default": Arm("default"),
    "cosine 0.1": _penalty("cosine", 0.1),
    "cosine 1": _penalty("cosine", 1.0),
    "frobenius 0.001": _penalty("frobenius", 0.001),
    "frobenius 0.1": _penalty("frobenius", 0.1),
    "gaussian": Arm("init", {"init": "gaussian"}),
    "orthogonal": Arm("init", {"init": "orthogonal"}),
    "svd": Arm("init", {"init": "svd"}),
    "nothing shared": Arm("sharing", {"shared_parameters": False}),
    "LoRA alone, shared": _only(ATTENTION, True),
    "LoRA alone, not shared": _only(ATTENTION, False),
    "bottlenecks alone, shared": _only(FEED_FORWARD, True),
    "bottlenecks alone, not shared": _only(FEED_FORWARD, False),
    "ranks by importance": Arm("allocation", within=None),
    "ranks by importance within kinds": Arm("allocation", within="kind"),
}


@dataclass(frozen=True)
class Task:
    """The trained base's state and blocks of bytes [n, length]."""

    state: dict[str, torch.Tensor]
    train: torch.Tensor
    choice: torch.Tensor
    test: torch.Tensor


def make_task() -> Task:
    """Train the base; the same on every call."""
    torch.manual_seed(BASE_SEED)
    model, source = _model(), _blocks(corpus.python_sources(400_000)[0])
    _train(model, source, BASE_STEPS, BASE_RATE, BASE_SEED, "base")
    train, held_out = map(_blocks, corpus.help_topics())
    held_out = held_out[torch.randperm(len(held_out))]
    choice, test = held_out[:HELD_OUT], held_out[HELD_OUT : 4 * HELD_OUT]
    return Task(model.state_dict(), train, choice, test)


def _model() -> nn.Module:
    config = LlamaConfig(
        vocab_size=257, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _blocks(documents: list[str]) -> torch.Tensor:
    return torch.as_tensor(cut_blocks(documents, corpus.byte_pairs(), LENGTH).blocks).long()


def _train(
    model: nn.Module, blocks: torch.Tensor, steps: int, rate: float, seed: int, what: str = ""
) -> float:
    """Train what requires a gradient; return seconds a step."""
    generator = torch.Generator().manual_seed(seed)
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    bank = getattr(model, "hybrid_adapter", None)
    weight = bank.config.orthogonality_weight if bank is not None else 0.0
    model.train()
    begun = time.perf_counter()
    for _ in tqdm(range(steps), what, disable=None if what else True):
        batch = blocks[torch.randint(len(blocks), (BATCH,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        if weight:
            loss = loss + weight * orthogonality_penalty(model)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        schedule.step()
    return (time.perf_counter() - begun) / steps


@torch.no_grad()
def _loss(model: nn.Module, blocks: torch.Tensor) -> float:
    model.eval()
    return model(input_ids=blocks, labels=blocks).loss.item()


def run(task: Task, arm: Arm, rate: float, seed: int, judged: torch.Tensor) -> dict[str, Any]:
    """Adapt the base once: held-out loss, condition of A and B, sizes, seconds a step."""
    model = _model()
    model.load_state_dict(task.state)
    torch.manual_seed(seed)
    add_hybrid_adapter_to_model(model, HybridAdapterConfig(**arm.changes))
    if arm.within != "":
        batches = [{"input_ids": b, "labels": b} for b in task.train[: 8 * BATCH].split(BATCH)]
        scores = analyze_layer_importance(model, batches)
        set_dynamic_rank_allocation(model, scores, within=arm.within, verbose=False)
    before = _loss(model, judged)
    seconds = _train(model, task.train, STEPS, rate, seed)
    bank = model.hybrid_adapter
    found = {
        "before": before,
        "loss": _loss(model, judged),
        "parameters": sum(p.numel() for p in bank.parameters()),
        "bytes": sum(p.numel() * p.element_size() for p in bank.parameters()),
        "seconds_a_step": seconds,
        "condition_a": _condition(bank.lora_a.values()),
        "condition_b": _condition(bank.lora_b.values()),
    }
    if arm.within != "":
        found["sizes"] = {path: site.spec.size for path, site in bank.sites.items()}
        found["scores"] = scores
    return found


@torch.no_grad()
def _condition(matrices) -> float | None:
    """The median of largest over smallest singular value; None where there is no matrix."""
    values = [torch.linalg.svdvals(matrix.float()) for matrix in matrices]
    return statistics.median((v[0] / v[-1]).item() for v in values) if values else None


def study(out: Path, seeds: int, arms: list[str]) -> None:
    """Run what the file does not have yet."""
    lines = out.read_text().splitlines() if out.exists() else []
    done = [json.loads(line) for line in lines]
    have = {(r["arm"], r["rate"], r["seed"]): r for r in done if r["kind"] == "adapters"}
    head = {"kind": "adapters-run", "run": uuid.uuid4().hex[:12], **machine.facts()}
    task, wrote = make_task(), False

    def cell(name: str, rate: float, seed: int) -> dict[str, Any]:
        nonlocal wrote
        if (name, rate, seed) not in have:
            judged = task.choice if seed == TRIAL_SEED else task.test
            found = run(task, ARMS[name], rate, seed, judged)
            record = {"kind": "adapters", "run": head["run"], "arm": name,
                      "part": ARMS[name].part, "rate": rate, "seed": seed, **found}  # fmt: skip
            append(out, [record] if wrote else [head, record])
            have[name, rate, seed], wrote = record, True
        return have[name, rate, seed]

    for name in tqdm(arms, "arms", disable=None):
        trials = {rate: cell(name, rate, TRIAL_SEED)["loss"] for rate in TRIALS}
        best = min(trials, key=trials.get)
        for seed in range(seeds):
            cell(name, best, seed)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.adapters_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm after its trials")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines")
    options = parser.parse_args(arguments)
    study(options.out, options.seeds, options.arms)
    return 0


if __name__ == "__main__":
    sys.exit(main())
