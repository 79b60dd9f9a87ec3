"""The forwards that fused modules run.

Each takes the module first. What an operation does not take (another dtype, a tensor that stands
for others, another device), and what is being compiled, goes to the class's own forward: Inductor
fuses these operations itself, and Dynamo sees transformers' code.
"""

import functools
from collections.abc import Callable
from types import FunctionType

import torch
from torch import nn

from artemis_kernels import gated_activation, rms_norm, rotary_embedding

from .activations import activation_of
from .originals import APPLY_ROTARY, GATE, NORM, ROTARY


def norm(module: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
    """`rms_norm` of x [..., n], under whichever name x has."""
    (x,) = *args, *kwargs.values()
    weight = module.weight
    if _takes(x) and x.dtype == weight.dtype and x.shape[-1:] == weight.shape:
        return rms_norm(x, weight, module.variance_epsilon)
    return type(module).forward(module, x)


def gated_mlp(module: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
    """Of x [..., in], with `gated_activation` between the products.

    The activation is looked up at each call: it may have been replaced, or carry a hook by now.
    """
    (x,) = *args, *kwargs.values()
    if torch.compiler.is_compiling() or (activation := activation_of(module.act_fn)) is None:
        return type(module).forward(module, x)
    gate, up = module.gate_proj(x), module.up_proj(x)
    if _takes(gate) and _takes(up) and gate.dtype == up.dtype and gate.shape == up.shape:
        return module.down_proj(gated_activation(gate, up, activation))
    return module.down_proj(module.act_fn(gate) * up)


def attention(module: nn.Module, *args, **kwargs):
    """The class's own forward, with `rotary_embedding` where it turns q and k."""
    compiling = torch.compiler.is_compiling()
    forward = type(module).forward if compiling else _with_rotary(type(module))
    return forward(module, *args, **kwargs)


_FEW_ROWS = 8
FORWARDS = {NORM: norm, GATE: gated_mlp, ROTARY: attention}


@functools.cache
def _with_rotary(cls: type[nn.Module]) -> FunctionType:
    """The forward of `cls`, the same code, over globals in which one name is ours."""
    own = cls.forward
    names = own.__globals__ | {APPLY_ROTARY: _rotary(own.__globals__[APPLY_ROTARY])}
    copy = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    copy.__kwdefaults__ = own.__kwdefaults__
    return copy


def _rotary(original: Callable) -> Callable:
    """`rotary_embedding` as attention calls it; `original` where that would be another thing."""

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        if unsqueeze_dim == 1 and _turns(q, k, cos, sin):
            return rotary_embedding(q, k, cos, sin)
        return original(q, k, cos, sin, unsqueeze_dim)

    return apply_rotary_pos_emb


def _turns(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether `rotary_embedding` takes these and returns the dtype that attention goes on with.

    Where cos is wider than q the original returns its dtype, which autocast takes back.
    """
    if q.dim() != 4 or q.dtype != k.dtype or not (_takes(q[:, 0]) and _takes(k[:, 0])):
        return False
    B, _, T, D = q.shape
    return (
        k.shape == (B, k.shape[1], T, D)
        and D % 2 == 0
        and cos.shape in ((B, T, D), (1, T, D))
        and sin.shape == cos.shape
        and (cos.dtype == q.dtype or torch.is_autocast_enabled(q.device.type))
    )


def _takes(x: torch.Tensor) -> bool:
    """Whether our operations are for x: a plain tensor, on a device they run on, not compiled.

    On a CPU with more than a few rows: of those, torch's several calls take no longer than ours.
    """
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
        return False
    if x.device.type == "cpu":
        return x.numel() >= _FEW_ROWS * x.shape[-1]
    return x.device.type == "cuda"
