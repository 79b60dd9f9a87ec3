"""Does a score of importance know which module repays training? The oracle says.

    python -m bench.importance --out bench/results/importance.jsonl     # about 10 minutes, one core
    python -m bench.importance --seeds 2 --architectures llama          # a quick look

A case: a small random model, and a copy of it in which the weights of a few modules, drawn at
random, were changed. The copy draws the labels. The oracle's importance of a module is how far the
held-out loss of the unchanged model falls when that module alone is trained for a few steps: its
adapter, or its weight. Each method's scores are compared with it by Spearman's rank correlation
over all modules.
"""

import argparse
import copy
import sys
import uuid
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from torch import nn
from tqdm import tqdm

from artemis import HybridAdapterConfig, add_hybrid_adapter_to_model
from artemis.benchmark import machine
from artemis.benchmark.records import append
from artemis.importance import METHODS, analyze_layer_importance

VOCABULARY, HIDDEN, LAYERS, LENGTH, BATCH = 64, 64, 3, 16, 32
#: The modules that the task's copy of a model has changed, and by how much of their norm.
PLANTED, CHANGE, CHANGE_RANK = 4, 0.5, 4
#: Deviation of the logits.
SHARPNESS = 2.0
#: What a score sees, and what the oracle does.
SCORED, STEPS, HELD_OUT = 8, 8, 512
RATES = {"adapter": 3e-3, "weight": 3e-4}
IGNORED = -100
#: The control among the methods.
BY_KIND = "by kind"


@dataclass(frozen=True)
class Architecture:
    """How to build one kind of model, and what is adapted in it."""

    build: Callable[[], nn.Module]
    attention: tuple[str, ...]
    feed_forward: tuple[str, ...]
    #: Whether logits at a position answer for the label at the next one.
    causal: bool


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCABULARY,
        initializer_range=0.12, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=LENGTH, vocab_size=VOCABULARY,
        initializer_range=0.12, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=4, vocab_size=VOCABULARY, initializer_range=0.12,
        tie_word_embeddings=False, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


ARCHITECTURES = {
    "llama": Architecture(
        _llama,
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        ("gate_proj", "up_proj", "down_proj"),
        True,
    ),
    "gpt2": Architecture(_gpt2, ("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj"), True),
    "bert": Architecture(
        _bert,
        ("query", "key", "value", "attention.output.dense"),
        ("intermediate.dense", "layer.{}.output.dense"),
        False,
    ),
}


def targets_of(architecture: Architecture) -> tuple[str, ...]:
    """The entries of `target_modules`, one for each layer where a name needs its number."""
    names = (*architecture.attention, *architecture.feed_forward)
    return tuple(
        name.format(layer) for name in names for layer in (range(LAYERS) if "{}" in name else (0,))
    )


@dataclass(frozen=True)
class Case:
    """A model with a fresh adapter, unshared and without dropout, and its task."""

    model: nn.Module
    planted: list[str]
    scored: list[dict[str, torch.Tensor]]
    training: list[dict[str, torch.Tensor]]
    held_out: dict[str, torch.Tensor]


def make_case(architecture: Architecture, seed: int) -> Case:
    """Draw the model, the change and the data of one case."""
    torch.manual_seed(seed)
    model = _with_sharp_logits(architecture.build().eval())
    config = HybridAdapterConfig(
        lora_rank=8, adapter_size=16, adapter_dropout=0.0, shared_parameters=False,
        target_modules=list(targets_of(architecture)), apply_lora_to=list(architecture.attention),
    )  # fmt: skip
    teacher = copy.deepcopy(model)
    add_hybrid_adapter_to_model(model, config)
    paths = list(model.hybrid_adapter.sites)
    planted = [paths[i] for i in torch.randperm(len(paths))[:PLANTED].tolist()]
    for path in planted:
        _change(teacher.get_submodule(path).weight)
    batches = [_batch(teacher, architecture.causal, BATCH) for _ in range(SCORED + STEPS)]
    held_out = _batch(teacher, architecture.causal, HELD_OUT)
    return Case(model, planted, batches[:SCORED], batches[SCORED:], held_out)


@torch.no_grad()
def _with_sharp_logits(model: nn.Module) -> nn.Module:
    """Scale the output layer, so that labels drawn from its logits say something."""
    logits = model(input_ids=torch.randint(3, VOCABULARY, (BATCH, LENGTH))).logits
    model.get_output_embeddings().weight.mul_(SHARPNESS / logits.std())
    return model


@torch.no_grad()
def _change(weight: torch.Tensor) -> None:
    """Add a random matrix of rank `CHANGE_RANK` and of `CHANGE` times the weight's norm."""
    rows, columns = weight.shape
    change = torch.randn(rows, CHANGE_RANK) @ torch.randn(CHANGE_RANK, columns)
    weight.add_(change * (CHANGE * weight.norm() / change.norm()))


@torch.no_grad()
def _batch(teacher: nn.Module, causal: bool, size: int) -> dict[str, torch.Tensor]:
    """Random tokens, with labels drawn from what the teacher makes of them."""
    tokens = torch.randint(3, VOCABULARY, (size, LENGTH))
    logits = teacher(input_ids=tokens).logits
    drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1).view(size, LENGTH)
    if causal:  # the model compares its logits with the label one place further
        drawn = torch.cat([torch.full((size, 1), IGNORED), drawn[:, :-1]], dim=1)
    return {"input_ids": tokens, "labels": drawn}


def oracle(case: Case, part: str) -> dict[str, float]:
    """How far the held-out loss falls when one module alone is trained, per module.

    `part`: "adapter", its adapter's parameters, or "weight", the weight itself.
    """
    model, bank = case.model, case.model.hybrid_adapter
    before = _held_out_loss(case)
    falls = {}
    for path, site in bank.sites.items():
        if part == "weight":
            own = [model.get_submodule(path).weight]
        else:
            own = [getattr(bank, role)[key] for role, (key, _) in site.layout.items()]
        with model.disable_adapter() if part == "weight" else nullcontext():
            falls[path] = before - _loss_after(case, own, RATES[part])
    return falls


def _loss_after(case: Case, own: list[torch.Tensor], rate: float) -> float:
    """The held-out loss after training `own` for a few steps; afterwards they are as before."""
    start = [tensor.detach().clone() for tensor in own]
    case.model.requires_grad_(False)
    for tensor in own:
        tensor.requires_grad_(True)
    optimizer = torch.optim.AdamW(own, lr=rate, weight_decay=0.0)
    for batch in case.training:
        optimizer.zero_grad()
        case.model(**batch).loss.backward()
        optimizer.step()
    loss = _held_out_loss(case)
    with torch.no_grad():
        for tensor, value in zip(own, start, strict=True):
            tensor.requires_grad_(False).copy_(value)
    return loss


@torch.no_grad()
def _held_out_loss(case: Case) -> float:
    return case.model(**case.held_out).loss.item()


def kind_of(path: str) -> str:
    """A module's path without its layer's number."""
    return ".".join(part for part in path.split(".") if not part.isdecimal())


def ranks(values: list[float]) -> numpy.ndarray:
    """Ranks from 0, equal values sharing the mean of theirs."""
    array = numpy.asarray(values)
    return ((array[:, None] > array).sum(1) + (array[:, None] >= array).sum(1) - 1) / 2


def spearman(first: list[float], second: list[float]) -> float:
    """Rank correlation; 0 where one side is constant."""
    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(), b - b.mean()
    norm = numpy.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm else 0.0


def measure(name: str, seed: int) -> dict[str, Any]:
    """One case: every method's scores and both oracles."""
    case = make_case(ARCHITECTURES[name], seed)
    methods = {m: analyze_layer_importance(case.model, case.scored, method=m) for m in METHODS}
    return {
        "kind": "importance",
        "architecture": name,
        "seed": seed,
        "planted": case.planted,
        "oracles": {part: oracle(case, part) for part in RATES},
        "scores": methods,
    }


def by_kind(records: list[dict[str, Any]], part: str) -> list[dict[str, float]]:
    """The control, a fixed table: each module gets its kind's mean rank in the *other* cases."""
    tables = []
    for record in records:
        seen = defaultdict(list)
        for other in records:
            if other is record or other["architecture"] != record["architecture"]:
                continue
            values = other["oracles"][part]
            for path, rank in zip(values, ranks(list(values.values())), strict=True):
                seen[kind_of(path)].append(rank)
        paths = record["oracles"][part]
        tables.append({path: float(numpy.mean(seen[kind_of(path)] or [0.0])) for path in paths})
    return tables


def agreement(records: list[dict[str, Any]], part: str, method: str) -> dict[str, Any]:
    """Rank correlations of one method with one oracle, case by case and in what differs.

    `differences`: of the ranks less each module's mean rank over the cases of its architecture.
    """
    scores = (
        [record["scores"][method] for record in records]
        if method != BY_KIND
        else by_kind(records, part)
    )
    pairs = [
        (record["architecture"], list(record["oracles"][part].values()), list(own.values()))
        for record, own in zip(records, scores, strict=True)
    ]
    differences = {}
    for name in dict.fromkeys(name for name, _, _ in pairs):
        sides = [
            numpy.stack([ranks(pair[side]) for pair in pairs if pair[0] == name]) for side in (1, 2)
        ]
        first, second = (side - side.mean(0) for side in sides)
        norm = numpy.sqrt((first**2).sum() * (second**2).sum())
        differences[name] = float((first * second).sum() / norm) if norm else 0.0
    return {"cases": [spearman(a, b) for _, a, b in pairs], "differences": differences}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.importance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=10, help="cases of each architecture")
    parser.add_argument(
        "--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES)
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="append JSON lines to FILE")
    options = parser.parse_args(arguments)
    head = {"kind": "importance-run", "run": uuid.uuid4().hex[:12], **machine.facts()}
    records = []
    cases = [(name, seed) for name in options.architectures for seed in range(options.seeds)]
    for name, seed in tqdm(cases, "cases", disable=None):
        records.append({"run": head["run"], **measure(name, seed)})
        if options.out is not None:
            append(options.out, [head, records[-1]] if len(records) == 1 else [records[-1]])
    print("oracle  method          mean worst   correlation of what differs between cases")
    for part in RATES:
        for method in (*METHODS, BY_KIND):
            found = agreement(records, part, method)
            mean, worst = numpy.mean(found["cases"]), min(found["cases"])
            differences = ", ".join(f"{n} {v:.2f}" for n, v in found["differences"].items())
            print(f"{part:8}{method:14}{mean:6.2f}{worst:6.2f}   {differences}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
