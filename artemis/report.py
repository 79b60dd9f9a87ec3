"""How many parameters there are and train, counted and in words."""

from torch import nn

from .layers.adapted import check_in_place
from .layers.bank import BANK, ROLES, AdapterBank, find_bank
from .layers.packed import packed_numbers


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers in `model`, adapted or not, packed ones too, and those of them that are trained."""
    bank, parameters = find_bank(model), model.named_parameters()
    base = sum(p.numel() for name, p in parameters if not name.startswith(f"{BANK}."))
    adapter = 0 if bank is None else _numbers(bank, *ROLES)
    return {
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total_parameters": base + packed_numbers(model) + adapter,
    }


def adapter_parts(model: nn.Module) -> dict[str, int]:
    """Numbers in each part of the adapter of `model`, and in the heads that train with it."""
    bank = find_bank(model)
    heads = (p for head in bank.heads for p in model.get_submodule(head).parameters())
    return {
        "lora": _numbers(bank, "lora_a", "lora_b"),
        "bottleneck": _numbers(bank, "down", "up", "bias_down", "bias_up"),
        "gains": _numbers(bank, "gain"),
        "heads": sum(p.numel() for p in heads),
    }


def _numbers(bank: AdapterBank, *roles: str) -> int:
    return sum(tensor.numel() for role in roles for tensor in getattr(bank, role).values())


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters train, of how many, and what they belong to.

    Raises `AdapterError` where an adapted module was replaced.
    """
    check_in_place(model, find_bank(model).sites.values())
    trainable, total = count_parameters(model).values()
    parts = ", ".join(f"{name} {count:,}" for name, count in adapter_parts(model).items())
    share = 100 * trainable / total
    print(f"trainable parameters: {trainable:,} of {total:,} ({share:.4f} %); {parts}")
