"""`gated_activation` on a CPU: a compiled pass each way, else plain torch.

    forward    y = act(g)·u
    backward   dg = dy·u·act'(g)        du = dy·act(g)

Kept for the backward: g and u; torch keeps act(g) beside them.
"""

import torch

from ...core import native
from ...core.activations import ACTIVATIONS
from ...core.units import KINDS
from ...core.widened import widened


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """y, contiguous, in their dtype."""
    library = native.library_for(gate)
    if library is None:
        return (ACTIVATIONS[activation].forward(widened(gate)) * up).to(gate.dtype).contiguous()
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    getattr(library, f"artemis_gated_forward_{native.NAMES[gate.dtype]}")(
        gate.data_ptr(), up.data_ptr(), y.data_ptr(), gate.numel(), KINDS.index(activation),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up, contiguous, in their dtype."""
    library = native.library_for(gate)
    if library is None:
        return _plain_backward(dy, gate, up, activation)
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    getattr(library, f"artemis_gated_backward_{native.NAMES[gate.dtype]}")(
        dy.data_ptr(), gate.data_ptr(), up.data_ptr(), dgate.data_ptr(), dup.data_ptr(),
        gate.numel(), KINDS.index(activation), torch.get_num_threads(),
    )  # fmt: skip
    return dgate, dup


def _plain_backward(dy, gate, up, activation):
    act, wide, d = ACTIVATIONS[activation], widened(gate), widened(dy)
    dgate, dup = act.backward(d * up, wide), d * act.forward(wide)
    return dgate.to(gate.dtype).contiguous(), dup.to(gate.dtype).contiguous()
