"""What `gated_activation` means, in plain torch; the oracle of its tests."""

import torch

from ..bottleneck_adapter.reference import ACTIVATIONS


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """gate and up of one shape -> act(gate)·up in their dtype, rounded once."""
    at_least = torch.promote_types(gate.dtype, torch.float32)
    return (ACTIVATIONS[activation](gate.to(at_least)) * up).to(gate.dtype)
