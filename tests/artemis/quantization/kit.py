"""Models quantized in one line, how far results are apart, and interruptions."""

import torch
from torch import nn

from artemis import quantize_adapter_model

FORMATS = {"int8": dict(bits=8), "fp8": dict(bits=8, format="fp8"), "int4": dict(bits=4)}


def quantized(model: nn.Module, format: str = "int8", adapter_bits: int = 32, **options):
    options = FORMATS[format] | dict(adapter_bits=adapter_bits, activation_bits=16) | options
    return quantize_adapter_model(model, **options)


def relative(got: torch.Tensor, truth: torch.Tensor) -> float:
    return ((got.double() - truth.double()).norm() / truth.double().norm()).item()


def interrupted_at(number: int, function, counts=lambda *args: True):
    """`function`, but for its `number`-th call that counts: Ctrl-C in its place."""
    calls = []

    def run(*args, **kwargs):
        calls.extend([1] * counts(*args))
        if len(calls) == number:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return run
