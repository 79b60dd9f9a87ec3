"""The gate: an adapter arm is timed only where its gradients are as right as plain PyTorch's.

Truth is the same step through the operations' references in the next wider precision (fp64 for
fp32, fp32 for bf16), on the same parameters, tokens and dropout masks; the yardstick is the
references in the arm's own precision. PEFT draws masks of its own: its arms are checked without
dropout.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .arms import TrainingStep

#: The dtype of a model -> that of its truth.
WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
_FACTOR = 1.25  # of the composed error: intermediates are rounded in either path
#: Of the dropout masks. The errors of a step's scalars go together, since they share the rounding
#: of its activations: one step says little about them, however many they are.
_SEEDS = (3, 4, 5, 6)
_PEFT_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.default\.weight")
_ARTEMIS_NAME = re.compile(r"hybrid_adapter\.(\w+)\.(.+)")


class Verdict(NamedTuple):
    """Largest error over its limit, and the kind of parameter that has it; right up to 1."""

    ratio: float
    role: str

    @property
    def passed(self) -> bool:
        return self.ratio <= 1.0  # a NaN is none

    def to_dict(self) -> dict[str, float | str]:
        return {"ratio": round(self.ratio, 3), "role": self.role}


Outcome = dict[str, torch.Tensor]  # `role:name` -> a result, in fp64


def check(
    step: TrainingStep,
    reference: Callable[[], TrainingStep],
    dtype: torch.dtype,
    masks: bool = True,
    tolerance: float | None = None,
    outcome: Callable[[TrainingStep, bool], Outcome] | None = None,
) -> Verdict:
    """Compare a step's gradients with the references'; leaves its B and up filled, not zero.

    `reference` builds the same step through the references over the base as it was, in `dtype`.
    Without `masks` all are compared in evaluation mode: their dropout masks differ. For an arm that
    rounds its base, `tolerance` is the rule: `rms(found - truth) ≤ tolerance · rms(truth)`.
    `outcome` is what is compared, the adapter's gradients unless given.
    """
    outcome = outcome or gradients
    fill_zeros(step.model)

    def of_reference(wide: torch.dtype | None) -> Outcome:
        other = reference()
        if wide is not None:
            other.model.to(wide)
        copy_parameters(step.model, other.model)
        other.batch = step.batch
        return outcome(other, masks)

    truth = of_reference(WIDER[dtype])
    if tolerance is not None:
        return compare(outcome(step, masks), truth, truth, 4 * tolerance)
    return compare(outcome(step, masks), of_reference(None), truth, torch.finfo(dtype).eps)


def fill_zeros(model: nn.Module) -> None:
    """Draw every adapter tensor that starts at zero: with B = 0, A's gradient would be none."""
    torch.manual_seed(2)
    for parameter in adapter_parameters(model).values():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the adapter parameters of `source`; the bases are equal already."""
    given = adapter_parameters(source)
    with torch.no_grad():
        for name, parameter in adapter_parameters(target).items():
            parameter.copy_(given[name])


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """`role:module path` -> parameter, of an Artemis adapter and of PEFT's LoRA alike."""
    found = {}
    for name, parameter in model.named_parameters():
        if match := _PEFT_NAME.fullmatch(name):
            found[f"lora_{match[2].lower()}:{match[1]}"] = parameter
        elif match := _ARTEMIS_NAME.fullmatch(name):
            found[f"{match[1]}:{match[2].replace('/', '.')}"] = parameter
    return found


def gradients(step: TrainingStep, masks: bool) -> Outcome:
    """Of every adapter parameter, after a forward and backward by each of some dropout masks."""
    found = {}
    step.model.train(masks)
    for seed in _SEEDS if masks else _SEEDS[:1]:
        torch.manual_seed(seed)
        step.backward()
        for name, p in adapter_parameters(step.model).items():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            found[f"{name}, masks {seed}"] = gradient.double()
        step.model.zero_grad()
    step.model.train()
    return found


def logits(step: TrainingStep, masks: bool) -> Outcome:
    """Of the batch's last two tokens in evaluation mode: one after a prompt, one decoded."""
    step.model.eval()
    with torch.inference_mode():
        first = step.model(input_ids=step.batch[:, :-1], use_cache=True, logits_to_keep=1)
        cache = first.past_key_values
        second = step.model(input_ids=step.batch[:, -1:], past_key_values=cache, use_cache=True)
    return {"logits:prefill": first.logits.double(), "logits:decode": second.logits.double()}


def compare(
    found: dict[str, torch.Tensor],
    composed: dict[str, torch.Tensor],
    truth: dict[str, torch.Tensor],
    eps: float,
) -> Verdict:
    """`rms(found - truth) ≤ c · rms(composed - truth) + eps/4 · rms(truth)`, role by role.

    c = 1.25 · (1 + 6/√n) for the n numbers of a role: of a few, either rms is known only roughly.
    Tensors of a role count alike, each divided by its own rms first; scalars, which may cancel to
    nothing, by that of all scalars of the role.
    """
    verdicts = []
    for role in sorted({name.partition(":")[0] for name in truth}):
        names = [name for name in truth if name.startswith(f"{role}:")]
        sizes = _sizes([truth[name] for name in names])
        error, allowed = (
            torch.cat(
                [
                    ((given[name] - truth[name]) / size).flatten()
                    for name, size in zip(names, sizes, strict=True)
                ]
            )
            for given in (found, composed)
        )
        factor = _FACTOR * (1 + 6 / len(error) ** 0.5)
        limit = factor * _rms(allowed) + eps / 4
        verdicts.append(Verdict(_rms(error) / limit, role))
    return max(verdicts, key=lambda verdict: (verdict.ratio != verdict.ratio, verdict.ratio))


def _sizes(tensors: list[torch.Tensor]) -> list[float]:
    """What each tensor's error is measured by."""
    if all(tensor.ndim == 0 for tensor in tensors):
        return [_rms(torch.stack(tensors))] * len(tensors)
    return [_rms(tensor) for tensor in tensors]


def _rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())
