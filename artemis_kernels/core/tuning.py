"""Placeholder until the kernels helper writes this file: same names, same signatures."""


def lora_strategy(rows, in_features, out_features, rank, drops, dtype, device):
    return "split", "split"


def adapter_strategy(rows, in_features, out_features, width, trains, dtype, device):
    return "folded", "folded"


def bottleneck_strategy(rows, hidden, width, dtype, device):
    return "row_block", "row block"
