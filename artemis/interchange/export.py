"""The LoRA half of a hybrid adapter, as PEFT writes it.

A bottleneck has no place in that format, and half of what was trained together is another model.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import HybridAdapterConfig
from ..errors import AdapterError, listed
from ..layers.bank import BANK, check_writable, find_bank, site_tensors
from ..paths import is_within
from ..plan import Plan, SiteSpec
from ..saving.adapter_file import read_adapter
from ..saving.identity import name_of
from ..saving.state import adapter_state
from ..wrappers import unwrapped
from .files import write_files

#: "peft": each module with its own rank and factor. "vllm": for readers that know one rank and one
#: factor, as vLLM's: the factor is within B, smaller ranks are filled up with zeros.
FORMS = ("peft", "vllm")
#: PEFT's names of the tasks for which it has a model class of its own -> transformers' tables.
_TASKS = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class ExportReport:
    """What `export_adapter` wrote to `path`: modules and heads, and what has no place there."""

    path: Path
    form: str
    #: Path of a module -> the rank it has in the file.
    modules: dict[str, int]
    heads: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        ranks = sorted(set(self.modules.values()))
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        lines = [f"{self.path}: LoRA of {len(self.modules)} modules, rank {rank}, for {self.form}"]
        if self.heads:
            lines.append(f"with the trained heads {listed(self.heads)}")
        if self.left_out:
            lines.append(
                f"left out: {listed(self.left_out)}; what is exported is another model than the"
                " hybrid"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Adapter:
    """An adapter, from a model or from its file."""

    config: HybridAdapterConfig
    plan: Plan
    tensors: Mapping[str, torch.Tensor]
    class_name: str
    base_name: str

    def pair(self, site: SiteSpec) -> Pair:
        """A and B of a module, its gain within B."""
        used = {
            role: self.tensors[f"{BANK}.{role}.{key}"][tuple(map(slice, shape))]
            for role, (key, shape) in site_tensors(site, self.config).items()
        }
        return used["lora_a"], _times(used["lora_b"], used.get("gain", 1.0))


def export_adapter(
    source: nn.Module | str | os.PathLike,
    directory: str | os.PathLike,
    *,
    form: str = "peft",
    allow_partial: bool = False,
) -> ExportReport:
    """Write the LoRA half of an adapter into `directory`, as PEFT's files; return what was written.

    Replaces `adapter_config.json` and `adapter_model.safetensors` there and touches nothing else.

    Args:
        source: a model with the adapter, wrapped or not, or the path of a saved one; it stays as
            it is.
        form: "peft" for `PeftModel.from_pretrained`; "vllm" for readers of one rank and one factor.
        allow_partial: whether what has no place there may be left out: bottlenecks, and for vLLM
            trained heads. What is exported then is another model than the hybrid.

    Raises:
        AdapterError: something would be left out that was not allowed to; there is no LoRA; the
            adapter is held in 8 bits; another `form`.
        FileNotFoundError: there is no adapter at `source`.
    """
    if form not in FORMS:
        raise AdapterError(f"form: got {form!r}, allowed: {' or '.join(FORMS)}")
    source = unwrapped(source)
    adapter = _of_model(source) if isinstance(source, nn.Module) else _of_file(source)
    sites = [site for site in adapter.plan.sites if site.kind == "lora"]
    if not sites:
        raise AdapterError(f"{_named(source)} has no LoRA, and bottlenecks cannot be exported")
    heads = adapter.plan.heads if form == "peft" else ()
    left_out = tuple(site.path for site in adapter.plan.sites if site.kind != "lora")
    left_out += tuple(head for head in adapter.plan.heads if head not in heads)
    if left_out and not allow_partial:
        raise AdapterError(
            f"{_named(source)} has more than LoRA ({listed(left_out)}), for which files for {form}"
            " have no place; allow_partial=True (--allow-partial) leaves it out, which makes"
            " another model"
        )
    pairs = {site.path: adapter.pair(site) for site in sites}
    ranks, factor = {site.path: site.size for site in sites}, adapter.config.scaling_factor
    if form == "vllm":
        pairs = _of_one_rank(pairs, factor)
        ranks, factor = dict.fromkeys(ranks, max(ranks.values())), 1.0
    saved = {name: t for name, t in adapter.tensors.items() if is_within(name, heads)}
    path = Path(directory)
    write_files(path, _settings(adapter, ranks, factor, heads), pairs, saved)
    return ExportReport(path, form, ranks, heads, left_out)


def _settings(
    adapter: _Adapter, ranks: dict[str, int], factor: float, heads: tuple[str, ...]
) -> dict[str, Any]:
    """PEFT's settings; its factor is alpha / rank, so each rank has an alpha of its own."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # Anchored: PEFT takes a pattern also for the end of a path.
    others = {f"^{path}": rank for path, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": _task(adapter.class_name),
        "base_model_name_or_path": adapter.base_name or None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": _alpha(factor, usual),
        "rank_pattern": others,
        "alpha_pattern": {path: _alpha(factor, rank) for path, rank in others.items()},
        "lora_dropout": adapter.config.lora_dropout,
        "target_modules": list(ranks),
        "modules_to_save": list(heads) or None,
        "bias": "none",
        "fan_in_fan_out": False,  # PEFT itself sees where a layer is transposed
        "use_rslora": False,
        "use_dora": False,
    }


def _alpha(factor: float, rank: int) -> int | float:
    """A whole number where it is one: some readers take no other."""
    alpha = factor * rank
    return int(alpha) if alpha == int(alpha) else alpha


def _task(class_name: str) -> str | None:
    from transformers.models.auto import modeling_auto  # takes a quarter of a second

    for task, table in _TASKS.items():
        if class_name in getattr(modeling_auto, table).values():
            return task
    return None


def _of_one_rank(pairs: dict[str, Pair], factor: float) -> dict[str, Pair]:
    """The same products without a factor, all of the largest rank."""
    largest = max(len(a) for a, _ in pairs.values())
    padded = {}
    for path, (a, b) in pairs.items():
        missing = largest - len(a)
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
        b = torch.cat([_times(b, factor), b.new_zeros(len(b), missing)], dim=1)
        padded[path] = a, b
    return padded


def _times(tensor: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
    """Their product in at least fp32, rounded once; a number of 1 changes nothing."""
    if isinstance(factor, float) and factor == 1.0:
        return tensor
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor.to(wide) * factor).to(tensor.dtype)


def _of_model(model: nn.Module) -> _Adapter:
    bank = find_bank(model)
    if bank is None:
        raise AdapterError(f"{type(model).__name__} has no hybrid adapter to export")
    check_writable(bank, "exported")
    plan = bank.plan()
    tensors = {n: t.detach().cpu() for n, t in adapter_state(model, plan.heads).items()}
    return _Adapter(bank.config, plan, tensors, type(model).__name__, name_of(model))


def _of_file(path: str | os.PathLike) -> _Adapter:
    file = read_adapter(path)
    return _Adapter(file.config, file.plan, file.load(), file.base.class_name, file.base.name)


def _named(source: nn.Module | str | os.PathLike) -> str:
    return type(source).__name__ if isinstance(source, nn.Module) else str(source)
