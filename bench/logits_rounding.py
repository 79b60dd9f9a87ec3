"""What each way to round the gradient of logits to 8 bits does to what a head passes on.

The truth is dX = dY W in fp64, for the loss of a trained model on held-out text and its head in
int8. Errors are relative: of dX itself, and of a sum over tokens that a model learns from, the
gradient of the last norm's gain.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from artemis.cli.demo.recipe import Workspace
from artemis.training import load_base
from artemis_kernels import QuantizedWeight
from artemis_kernels.core import eight_bit
from artemis_kernels.core.eight_bit_rows import round_logits

KIND = "logits-rounding"
SEQUENCES = 8

Gradient = Callable[[torch.Tensor, QuantizedWeight], torch.Tensor]


def nearest(dy: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """Each number to the nearest level, as in any other layer."""
    return eight_bit.input_gradient(dy, weight.data, weight.scale)


def peak_apart(dy: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """The largest number of each row multiplied unrounded, the others to the nearest."""
    at = round_logits(dy, weight.scale).peaks.at
    peak = dy.gather(1, at[:, None])
    rest = nearest(dy.scatter(1, at[:, None], 0.0), weight)
    return rest + peak * weight.data[at].float() * weight.scale[at, None]


def errors_passed_on(dy: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """What a packed head does."""
    return eight_bit.input_gradient(dy, weight.data, weight.scale, logits=True)


def in_bf16(dy: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """No 8 bits: dY and the dequantized weight in bf16."""
    return (dy.bfloat16() @ weight.dequantize(torch.bfloat16)).float()


WAYS: dict[str, Gradient] = {
    "bf16": in_bf16,
    "int8, to the nearest": nearest,
    "int8, peak apart": peak_apart,
    "int8, peak apart, errors passed on": errors_passed_on,
}


def errors(space: Workspace) -> Iterator[dict[str, Any]]:
    """A record for each way, over the workspace's base."""
    model, _ = load_base(str(space.base), torch.float32)
    ids = space.held_out_data("new").blocks[:SEQUENCES].long()
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, logits: seen.extend((*args, logits)))
    loss = model(input_ids=ids, labels=ids).loss
    x, logits = seen
    (dy,) = torch.autograd.grad(loss, logits)
    dy, x = dy.flatten(0, 1), x.detach().flatten(0, 1)
    weight = QuantizedWeight.quantize(model.lm_head.weight.detach())
    normed = (x / model.model.norm.weight.detach()).double()
    truth = dy.double() @ weight.dequantize(torch.float64)
    for name, gradient in WAYS.items():
        dx = gradient(dy, weight).double()
        yield {
            "kind": KIND, "way": name, "words": weight.shape[0], "tokens": len(dy),
            "loss": loss.item(), "dx": _relative(dx, truth),
            "gain": _relative((dx * normed).sum(0), (truth * normed).sum(0)),
        }  # fmt: skip


def _relative(got: torch.Tensor, truth: torch.Tensor) -> float:
    return ((got - truth).norm() / truth.norm()).item()
