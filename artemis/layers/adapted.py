"""Linear layers with an adapter: subclasses over the very same parameters, packed ones included.

Injection sets `module.__class__`, so no parameter moves or changes its name, `isinstance` still
holds, and, the classes being importable, whole models pickle.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import AdapterError, listed
from . import frozen
from .linear import weight_of
from .packed_linear import QUANTIZED, QuantizedConv1D, QuantizedLinear
from .sites import Site


class _DropsConstants:
    """What the adapted classes share."""

    adapter: Site

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode; where training begins, what was worked out for inference is dropped.

        A compiled forward cannot do that, and fused optimizers change tensors uncounted.
        """
        if mode:
            self.adapter.forget()
        return super().train(mode)


class AdaptedLinear(_DropsConstants, nn.Linear):
    """`nn.Linear` whose forward runs its site's operation."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        if not self.adapter.active:
            return super().forward(input)
        return _adapted(self, input, super().forward)

    def extra_repr(self) -> str:
        spec = self.adapter.spec
        return f"{super().extra_repr()}, {spec.kind}={spec.size}"


class AdaptedConv1D(_DropsConstants, Conv1D):
    """transformers' `Conv1D` (GPT-2) whose forward runs its site's operation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        if not self.adapter.active:
            return super().forward(x)
        return _adapted(self, x, super().forward)

    def __repr__(self) -> str:
        spec = self.adapter.spec
        return f"AdaptedConv1D(nf={self.nf}, nx={self.nx}, {spec.kind}={spec.size})"


class AdaptedQuantizedLinear(AdaptedLinear, QuantizedLinear):
    """An adapted linear layer over a packed weight."""


class AdaptedQuantizedConv1D(AdaptedConv1D, QuantizedConv1D):
    """An adapted `Conv1D` over a packed weight."""


ADAPTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: AdaptedLinear,
    Conv1D: AdaptedConv1D,
    QuantizedLinear: AdaptedQuantizedLinear,
    QuantizedConv1D: AdaptedQuantizedConv1D,
}
#: Any linear layer, adapted or not -> the class of the same over a packed weight.
PACKED: dict[type[nn.Module], type[nn.Module]] = QUANTIZED | {
    adapted: ADAPTED[QUANTIZED[plain]] for plain, adapted in ADAPTED.items() if plain in QUANTIZED
}


def _adapted(
    module: nn.Linear | Conv1D, x: torch.Tensor, base: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The site's operation on x: at inference from its constants; else alone, or with the modules
    that read the same x."""
    site = module.adapter
    y = frozen.output(module, x, site, base)
    if y is None and site.group is not None:
        y = site.group.output(module, x)
    return site.linear(x, weight_of(module), module.bias, module.training) if y is None else y


def adapt(module: nn.Module, site: Site) -> None:
    """Turn a linear layer into its adapted class, in place."""
    module.__class__ = ADAPTED[type(module)]
    module.adapter = site


def restore(module: nn.Module) -> None:
    """Turn an adapted layer back into what it was."""
    vars(module).pop("forward", None)  # the class's own at most, see `has_own_forward`
    module.__class__ = _plain(type(module))
    del module.adapter


def has_own_forward(module: nn.Module) -> bool:
    """Whether the layer carries another forward than its class's, as accelerate sets it.

    Taking its hooks off, accelerate leaves the class's, bound, with the layer.
    """
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def _plain(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that `cls` would be without the adapter.

    torch's parametrizations put a class of the one module's own on top of its class.
    """
    plain = {adapted: plain for plain, adapted in ADAPTED.items()}
    if cls in plain:
        return plain[cls]
    bases = tuple(plain.get(base, base) for base in cls.__bases__)
    name = cls.__name__.replace(cls.__bases__[0].__name__, bases[0].__name__)
    return type(name, bases, dict(vars(cls)))


def adapted_module(model: nn.Module, site: Site) -> nn.Module | None:
    """The module that `site` acts on, in its place or in what wraps it there; None: replaced."""
    try:
        found = model.get_submodule(site.spec.path)
    except AttributeError:
        return None
    for module in found.modules():
        hooks = module._forward_hooks.values()
        if vars(module).get("adapter") is site or any(hook is site for hook in hooks):
            return module
    return None


def check_in_place(model: nn.Module, sites: Iterable[Site]) -> None:
    """Raise `AdapterError` where another module stands in the place of the one that was adapted."""
    problem = replaced(model, sites)
    if problem is not None:
        raise AdapterError(
            f"{problem}; put the module back, or call remove_adapter() and add the adapter to the"
            " model as it is now"
        )


def replaced(model: nn.Module, sites: Iterable[Site]) -> str | None:
    """Which modules stand in the place of adapted ones, and what that means; None for none."""
    paths = [site.spec.path for site in sites if adapted_module(model, site) is None]
    if not paths:
        return None
    return (
        f"{listed(paths)}: replaced after the adapter was added (resize_token_embeddings replaces"
        " an output head), so that the adapter does not run there"
    )
