"""What is compared: the arms, the families that share a learning rate, the comparisons.

All of it is fixed here, before anything is run.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod

from ...allocation import set_dynamic_rank_allocation
from ...config import HybridAdapterConfig
from ...errors import AdapterError
from ...hybrid import add_hybrid_adapter_to_model
from ...importance import analyze_layer_importance
from ...layers.bank import bank_shapes
from ...targets import make_plan, matching
from .data import Batch
from .model import Classifier
from .probe import PENALTIES

#: Names of the attention's and of the feed-forward layer's projections: the first pair of which a
#: model has all. An entry takes what an earlier one has left.
_PROJECTIONS = (
    (("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")),
    (("query", "key", "value", "attention.output.dense"), ("intermediate.dense", "output.dense")),
    (("q_lin", "k_lin", "v_lin", "out_lin"), ("lin1", "lin2")),
    (("c_attn", "attn.c_proj"), ("c_fc", "mlp.c_proj")),
)
Scores = dict[str, float]


@dataclass(frozen=True)
class Family:
    """Arms that share a setting, chosen from as many trials as any other family has."""

    trials: tuple[float, ...]
    frozen: bool = True


FAMILIES = {
    "head": Family(PENALTIES),
    "full": Family((1e-5, 3e-5, 1e-4, 3e-4), frozen=False),
    **{
        name: Family((1e-3, 3e-3, 1e-2, 3e-2))
        for name in ("lora", "lora-budget", "bottleneck", "hybrid-unshared", "hybrid")
    },
}


@dataclass(frozen=True)
class Arm:
    """`prepare(model, batches, seed)` readies a model for training; `what` is its name in words.

    `trial` is the arm that its family's setting is chosen with.
    """

    what: str
    family: str
    prepare: Callable[[Classifier, list[Batch], int], None]
    trial: bool = True


def projections(model: Classifier) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the attention's and of the feed-forward layers' projections in `model`."""
    paths = [path for path, _ in model.named_modules()]
    for pair in _PROJECTIONS:
        names = (*pair[0], *pair[1])
        if all(any(matching((name,), path) for path in paths) for name in names):
            return pair
    raise AdapterError(
        f"--model: no projections are known in a {type(model.encoder).__name__}; allowed: models"
        " with the names of Llama's, BERT's, DistilBERT's or GPT-2's"
    )


def hybrid_config(model: Classifier, **changes) -> HybridAdapterConfig:
    """The library's defaults on all projections of `model`; the head trains, too."""
    attention, feed_forward = projections(model)
    values = {
        "target_modules": (*attention, *feed_forward),
        "apply_lora_to": attention,
        "modules_to_save": ("head",),
    }
    return HybridAdapterConfig(**values | changes)


def parameters_of(model: Classifier, config: HybridAdapterConfig) -> int:
    """Adapter parameters that exist, a shared one counted once."""
    tables = bank_shapes(make_plan(model, config).sites, config).values()
    return sum(prod(shape) for table in tables for shape in table.values())


def _full(model: Classifier, batches: list[Batch], seed: int) -> None:
    """Everything trains, but what the features do not depend on."""
    batch = {name: value.to(model.head.weight.device) for name, value in batches[0].items()}
    model(**batch)["loss"].backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def _frozen(model: Classifier, batches: list[Batch], seed: int) -> None:
    model.requires_grad_(False)


def _adapted(**changes) -> Callable[[Classifier, list[Batch], int], None]:
    def prepare(model: Classifier, batches: list[Batch], seed: int) -> None:
        add_hybrid_adapter_to_model(model, hybrid_config(model, **changes))

    return prepare


def _lora(model: Classifier, batches: list[Batch], seed: int) -> None:
    attention, _ = projections(model)
    config = hybrid_config(model, target_modules=attention, shared_parameters=False)
    add_hybrid_adapter_to_model(model, config)


def _bottleneck(model: Classifier, batches: list[Batch], seed: int) -> None:
    _, feed_forward = projections(model)
    # The names of attention stay, so that "output.dense" takes what it takes in the hybrid.
    plan = make_plan(model, hybrid_config(model))
    paths = tuple(site.path for site in plan.sites if site.kind != "lora")
    config = hybrid_config(model, target_modules=paths, apply_lora_to=(), shared_parameters=False)
    add_hybrid_adapter_to_model(model, config)


def _lora_at_budget(model: Classifier, batches: list[Batch], seed: int) -> None:
    """LoRA on all projections, of the rank that costs nearest to what the hybrid stores."""
    names = hybrid_config(model).target_modules
    config = hybrid_config(model, apply_lora_to=names, shared_parameters=False, lora_rank=1)
    rank = round(parameters_of(model, hybrid_config(model)) / parameters_of(model, config))
    add_hybrid_adapter_to_model(model, replace(config, lora_rank=max(1, rank)))


def _as_scored(model: Classifier, scores: Scores, seed: int) -> Scores:
    return scores


def _shuffled(model: Classifier, scores: Scores, seed: int) -> Scores:
    """The same scores, given to other modules at random."""
    values = list(scores.values())
    random.Random(seed).shuffle(values)
    return dict(zip(scores, values, strict=True))


def _reversed(model: Classifier, scores: Scores, seed: int) -> Scores:
    """The same scores, the greatest given to the module that had the least."""
    order = sorted(scores, key=scores.get)
    return dict(zip(order, (scores[path] for path in reversed(order)), strict=True))


def _allocated(
    given: Callable[[Classifier, Scores, int], Scores], within: str | None = None
) -> Callable[[Classifier, list[Batch], int], None]:
    """The shared hybrid, its ranks and widths allocated before training, at the same budget."""

    def prepare(model: Classifier, batches: list[Batch], seed: int) -> None:
        add_hybrid_adapter_to_model(model, hybrid_config(model))
        scores = analyze_layer_importance(model, batches, loss=lambda m, batch: m(**batch)["loss"])
        given_scores = given(model, scores, seed)
        set_dynamic_rank_allocation(model, given_scores, within=within, verbose=False)

    return prepare


ARMS: Mapping[str, Arm] = {
    "frozen": Arm("frozen base, linear head", "head", _frozen),
    "full": Arm("full fine-tuning", "full", _full),
    "lora": Arm("LoRA, attention", "lora", _lora),
    "lora-budget": Arm("LoRA, all projections, hybrid's budget", "lora-budget", _lora_at_budget),
    "bottleneck": Arm("bottlenecks", "bottleneck", _bottleneck),
    "hybrid-unshared": Arm(
        "hybrid, nothing shared", "hybrid-unshared", _adapted(shared_parameters=False)
    ),
    "hybrid": Arm("hybrid, shared (default)", "hybrid", _adapted()),
    "dynamic": Arm("hybrid, ranks by importance", "hybrid", _allocated(_as_scored), trial=False),
    "dynamic-kinds": Arm(
        "hybrid, ranks by importance within kinds",
        "hybrid",
        _allocated(_as_scored, within="kind"),
        trial=False,
    ),
    "random": Arm("hybrid, ranks at random", "hybrid", _allocated(_shuffled), trial=False),
    "reversed": Arm("hybrid, ranks reversed", "hybrid", _allocated(_reversed), trial=False),
}
CORE = ("frozen", "full", "lora-budget", "hybrid", "dynamic", "dynamic-kinds", "random")
#: Which arm is held against which; named before any of them was run.
COMPARISONS = (
    ("hybrid", "full"),
    ("lora-budget", "full"),
    ("hybrid", "lora-budget"),
    ("dynamic", "hybrid"),
    ("dynamic-kinds", "hybrid"),
    ("dynamic-kinds", "dynamic"),
    ("dynamic", "random"),
    ("dynamic-kinds", "random"),
    ("dynamic", "reversed"),
    ("hybrid", "hybrid-unshared"),
    ("hybrid", "lora"),
    ("hybrid", "bottleneck"),
)
#: What the default hybrid should reach against full fine-tuning on each task.
TARGETS = {"retention": 0.985, "gap": 0.95}
