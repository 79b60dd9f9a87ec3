"""How an operation becomes a torch operator: opaque to the compiler, differentiable, traceable.

Each operation is three torch operators with handwritten schemas: `name` (what the public function
calls), `name_forward` (also returns what the backward needs) and `name_backward`. The autograd
Function sits at `name`'s Autograd key and calls the other two below autograd, so that eager,
`torch.compile(fullgraph=True)` and activation checkpointing see one and the same operator.
docs/decisions/0002-operator-registration.md has the reasons and the measured overheads.
"""

from collections.abc import Callable, Iterable

import torch

from .device import has_autocast, launches_on_first_argument
from .types import Unavailable

#: Types of devices that operators have kernels for.
DEVICES = ("cpu", "cuda")
_LIBRARY = torch.library.Library("artemis", "DEF")


def define(schema: str, kernel: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Define `artemis::<schema>` with one Python kernel for every device; return the operator."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in DEVICES:
        on_device = launches_on_first_argument(kernel) if device == "cuda" else kernel
        _LIBRARY.impl(name, on_device, device.upper())
    torch.library.register_fake(f"artemis::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.artemis, name).default


def differentiate(
    name: str, function: type[torch.autograd.Function], call: Callable | None = None
) -> None:
    """Put `function` at the Autograd key of `artemis::<name>`, called by `call` or as it is.

    It has a backward and no more: forward mode and torch.func's derivatives are refused in the
    operation's name, where torch's own errors tell how to write an autograd.Function.
    """
    call = call or function.apply

    def refused(*_):
        raise Unavailable(
            f"{name}: there is no derivative in forward mode or by torch.func;"
            " impl='reference' has them"
        )

    def apply(*arguments):
        return (refused if torch._C._are_functorch_transforms_active() else call)(*arguments)

    function.jvp = staticmethod(refused)
    _LIBRARY.impl(name, apply, "Autograd")


class Operation(torch.autograd.Function):
    """Base of the operations' Functions."""

    @classmethod
    def apply(cls, *arguments):
        """torch's, without its look at every argument: no transform is active (`differentiate`)."""
        return super(torch.autograd.Function, cls).apply(*arguments)

    @staticmethod
    def below_autograd():
        """Context in which operators run their device kernels directly."""
        return torch._C._AutoDispatchBelowAutograd()


def once(name: str) -> Callable[[Callable], Callable]:
    """Decorator of the backward of operation `name`: autocast does not reach in.

    Its gradients are constants. Under `create_graph`, which alone leaves the grad mode on, they
    would make second derivatives wrong in silence, so it is refused; torch's once_differentiable
    refuses only where dY requires a gradient, and that of a sum does not.
    Where no gradient reached any output, none is passed on.
    """

    def decorate(backward: Callable) -> Callable:
        def wrapped(ctx, *grads):
            if torch.is_grad_enabled():
                raise Unavailable(
                    f"{name}: there is no second derivative (create_graph=True);"
                    " impl='reference' has one"
                )
            reached = next((grad for grad in grads if grad is not None), None)
            if reached is None:
                return (None,) * len(ctx.needs_input_grad)
            kind = reached.device.type
            if not has_autocast(kind) or not torch.is_autocast_enabled(kind):
                return backward(ctx, *grads)
            with torch.autocast(kind, enabled=False):
                return backward(ctx, *grads)

        return wrapped

    return decorate


def needed(gradients: Iterable[torch.Tensor | None], needs: Iterable[bool]) -> list[torch.Tensor]:
    """The gradients that are asked for, contiguous: what a backward operator returns."""
    return [gradient.contiguous() for gradient, need in zip(gradients, needs, strict=True) if need]


def by_place(gradients: Iterable[torch.Tensor], needs: Iterable[bool]) -> list[torch.Tensor | None]:
    """The reverse of `needed`: None where no gradient was asked for."""
    each = iter(gradients)
    return [next(each) if need else None for need in needs]


def empty_like_needed(
    like: Iterable[torch.Tensor | None], needs: Iterable[bool]
) -> list[torch.Tensor]:
    """What a traced backward returns: an empty tensor like each parameter that is to learn."""
    return [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        for tensor, need in zip(like, needs, strict=True)
        if need
    ]
