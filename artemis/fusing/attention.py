"""Attention of a model on a CPU by `artemis_kernels.attention`, and back."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from ..attention import NAME

_SDPA = "sdpa"


def fuse_attention(model: nn.Module) -> bool:
    """Whether `model` attends by our operation now: on a CPU, where it did so by sdpa."""
    whole = next(_models(model), None)
    if whole is None or whole.device.type != "cpu":
        return False
    parts = list(_models(whole))
    if {part.config._attn_implementation for part in parts} == {_SDPA} and all(
        part._supports_sdpa and part._can_set_attn_implementation() for part in parts
    ):
        whole.set_attn_implementation(NAME)
    return whole.config._attn_implementation == NAME


def unfuse_attention(model: nn.Module) -> None:
    """Back to sdpa."""
    whole = next(_models(model), None)
    if whole is not None and whole.config._attn_implementation == NAME:
        whole.set_attn_implementation(_SDPA)


def _models(model: nn.Module) -> Iterator[PreTrainedModel]:
    """transformers' models in `model`, the outermost first."""
    return (module for module in model.modules() if isinstance(module, PreTrainedModel))
