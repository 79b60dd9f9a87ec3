"""Floating-point operations of a step, counted by `torch.utils.flop_counter` without computing.

The model is built on the meta device and runs through the operations' references: matrix
products only, attention over all pairs of positions, bottlenecks as they are defined (a fold
through the base is a saving of time, not of what was asked for).
"""

import functools
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from .arms import ARMS
from .models import Architecture

_LAYERS = 2  # enough to know what a layer adds


@functools.cache
def training_flops(arm_name: str, sizes: Architecture, batch: int, sequence: int) -> int:
    """FLOPs of forward and backward of one step of the whole model."""
    one, two = (
        _counted(arm_name, replace(sizes, layers=layers), batch, sequence)
        for layers in (1, _LAYERS)
    )
    return one + (sizes.layers - 1) * (two - one)


def _counted(arm_name: str, sizes: Architecture, batch: int, sequence: int) -> int:
    arm = ARMS[arm_name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            sizes.config(sequence), dtype=torch.bfloat16, attn_implementation="eager"
        ).train()
        model = (arm.counted or arm.reference or arm.adapt)(model)
        tokens = torch.zeros(batch, sequence, dtype=torch.int64)
        inputs = {  # both given, since transformers would look at values to make them
            "position_ids": torch.arange(sequence)[None],
            "attention_mask": torch.zeros(batch, 1, sequence, sequence, dtype=torch.bfloat16),
        }
        with FlopCounterMode(display=False) as counter:
            model(input_ids=tokens, labels=tokens, **inputs).loss.backward()
    return counter.get_total_flops()
