"""Whether an adapter can be trained as its model stands, and kept; asked before a run begins."""

import torch
from torch import nn

from ..errors import AdapterError, listed
from ..layers.adapted import check_in_place
from ..layers.bank import check_writable, find_bank
from ..merging import check_unmerged
from ..saving.checkpoint import trained_and_not_saved


def check_ready(model: nn.Module) -> None:
    """Raise `AdapterError` where training `model` would be in vain, in whole or in part."""
    check_unmerged(model)
    bank = find_bank(model)
    check_writable(bank, "trained")
    check_in_place(model, bank.sites.values())
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise AdapterError(
            "nothing of the model would be trained: no parameter requires a gradient"
        )
    if names := trained_and_not_saved(model):
        raise AdapterError(
            f"{listed(names)}: would be trained and not saved, since checkpoints hold the adapter"
            " and its heads; name their modules in modules_to_save, or freeze them"
        )


def check_checkpointing(model: nn.Module) -> None:
    """Raise `AdapterError` where layers checkpoint so that their adapters would get no gradient.

    Reentrant checkpointing hands gradients on only where an input requires one. transformers sees
    to that for the embeddings of tokens; those of pictures and sound come from a frozen base.
    """
    if hasattr(model, "_require_grads_hook"):  # set by enable_input_require_grads
        return
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is None or not module.gradient_checkpointing:
            continue
        given = getattr(checkpoint, "keywords", {}).get("use_reentrant")
        if given is not False:  # torch takes None for True
            raise AdapterError(
                f"activation checkpointing: got use_reentrant={given}, allowed: False, since no"
                f" input of {type(model).__name__} requires a gradient, and adapters would get none"
            )


def narrow_parts(model: nn.Module, scaled: bool) -> list[str]:
    """Sentences on what trains in 16 bits, of the adapter and each head.

    Raises `AdapterError` for float16 where the loss is `scaled` (fp16=True): torch takes the factor
    back from wider gradients only.
    """
    parts = {"the adapter": (find_bank(model), "adapter_bits=32, adapter_dtype: float32")}
    for head in find_bank(model).heads:
        remedy = f"model.{head}.float(), with bf16=True or fp16=True"
        parts[f"the head {head}"] = (model.get_submodule(head), remedy)
    found = []
    for name, (module, remedy) in parts.items():
        narrow = {p.dtype for p in module.parameters() if p.requires_grad and p.itemsize < 4}
        if scaled and torch.float16 in narrow:
            raise AdapterError(
                f"{name} is held in torch.float16, which fp16=True cannot train; hold it in"
                f" float32 ({remedy})"
            )
        if narrow:
            found.append(
                f"{name} is held in {listed(narrow)}: an update smaller than half a step of that"
                f" is lost; train it in float32 ({remedy})"
            )
    return found
