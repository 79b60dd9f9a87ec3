"""How many parameters train, in words."""

from torch import nn

from .layers.adapted import check_in_place
from .layers.bank import BANK, ROLES, find_bank
from .layers.packed import packed_numbers


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count parameters: trainable, all (packed ones too), and those of LoRA, bottlenecks, ..."""
    bank = find_bank(model)

    def count(*tables: str) -> int:
        return sum(t.numel() for table in tables for t in getattr(bank, table).values())

    heads = (p for head in bank.heads for p in model.get_submodule(head).parameters())
    parameters = model.named_parameters()
    base = sum(p.numel() for name, p in parameters if not name.startswith(f"{BANK}."))
    return {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "all": base + packed_numbers(model) + count(*ROLES),
        "lora": count("lora_a", "lora_b"),
        "bottleneck": count("down", "up", "bias_down", "bias_up"),
        "gains": count("gain"),
        "heads": sum(p.numel() for p in heads),
    }


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters train, of how many, and what they belong to.

    Raises `AdapterError` where an adapted module was replaced.
    """
    check_in_place(model, find_bank(model).sites.values())
    counts = count_parameters(model)
    share = 100 * counts["trainable"] / counts["all"]
    parts = ", ".join(
        f"{name} {counts[name]:,}" for name in ("lora", "bottleneck", "gains", "heads")
    )
    print(
        f"trainable parameters: {counts['trainable']:,} of {counts['all']:,} ({share:.4f} %)"
        f"; {parts}"
    )
