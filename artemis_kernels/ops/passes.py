"""Which of its two ways an eager path over rows goes: a compiled pass, or plain torch."""

import torch

from ..core import call, native


def told(path: call.Path, x: torch.Tensor) -> call.Path:
    """`path` with its way named where it is eager, for `explain`; not to be traced."""
    if path.impl != "eager":
        return path
    if native.library_for(x) is None:
        return path._replace(
            strategy="plain", reason=f"{path.reason} and there is no compiled pass for them"
        )
    return path._replace(
        strategy="compiled", reason=f"{path.reason} and there is a compiled pass for them"
    )


def chosen(op: str, impl: str | None, x: torch.Tensor) -> call.Path:
    """The path of an operation over rows of x, which has one strategy for each implementation."""
    impl, reason = call.implementation(op, impl, x.dtype, x.device, False)
    strategy = {"reference": "composed", "triton": "rows", "eager": "passes"}[impl]
    return call.Path(impl, strategy, reason)
