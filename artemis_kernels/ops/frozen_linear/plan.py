"""Which path a call of `frozen_linear` takes, after its arguments were checked; nothing runs."""

import torch
from torch.autograd import forward_ad

from ...core import base, call, checks, frozen, packed_choice, tables, tuning
from ...core.frozen import FrozenAdapter
from ...core.quantized import QuantizedWeight
from ...core.strategies import FROZEN, Case, named, weight_of

NAME = "frozen_linear"


def plan(x, weight, adapter, *, impl=None) -> call.Path:
    """Check the arguments of `frozen_linear` and choose its path; runs nothing."""
    checks.input_tensor(NAME, x)
    checks.weight(NAME, weight, x)
    _check_adapter(x, weight, adapter)
    dtype = call.compute_dtype(x)
    checks.same_dtype(NAME, "adapter", adapter.down, dtype)
    checks.weight_dtype(NAME, weight, x)
    checks.options(NAME, 0.0, impl, adapter.activation)
    _check_no_derivative(x, weight, adapter)
    impl, reason = call.implementation(NAME, impl, dtype, x.device, False)
    if impl == "reference":
        return call.Path(impl, "composed", reason)
    (out_features, in_features), rank = weight.shape, adapter.down.shape[0]
    case = Case(
        FROZEN + _kind(adapter), call.rows(x), in_features, out_features, rank,
        named(dtype), weight_of(weight),
    )  # fmt: skip
    normal = usual(case, impl, weight, x.device)
    strategy, why = _tuned(case, impl, x.device, normal)
    if strategy.startswith("one_call") and not _fits_one_call(case, weight, x.device):
        strategy, why = normal  # it won over a weight that the pass takes
    return call.Path(impl, strategy, f"{reason} and {why}" if why else reason)


def _check_no_derivative(x, weight, adapter) -> None:
    asking = asks_for_gradient(x, weight, adapter)
    if asking is not None:
        raise ValueError(
            f"{NAME}: {asking} requires a gradient, and there is none here; call it under"
            " torch.no_grad(), or take lora_linear or adapter_linear"
        )
    if in_forward_mode():
        tensors = _tensors(x, weight, adapter).values()
        if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            raise ValueError(
                f"{NAME}: x, weight or a constant has a tangent, and there is no derivative here;"
                " take lora_linear or adapter_linear with impl='reference'"
            )


def asks_for_gradient(x, weight, adapter) -> str | None:
    """The name of an argument that a gradient is asked for, if there is one."""
    if not torch.is_grad_enabled():
        return None
    tensors = _tensors(x, weight, adapter).items()
    return next((name for name, tensor in tensors if tensor.requires_grad), None)


def _tensors(x, weight, adapter) -> dict[str, torch.Tensor]:
    """Every tensor that a derivative could be of, by the name of its argument."""
    names = ("down", "up", "bias", "bias_down", "scale")
    given = {"x": x, "weight": weight} | {f"adapter.{n}": getattr(adapter, n) for n in names}
    return {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}


def in_forward_mode() -> bool:
    """Whether tensors may have tangents, which tell neither by type nor by `requires_grad`."""
    return forward_ad._current_level >= 0


def _tuned(case: Case, impl: str, device: torch.device, normal: tuple[str, str]) -> tuple[str, str]:
    """The measured winner, or `normal`; a layer without an adapter is a `quantized_linear`."""
    if case.width:
        return tables.choice(case, impl, device, normal)
    bare, (name, why) = case._replace(op="quantized_linear"), normal
    name = name.replace("products", "product")
    name, why = tables.choice(bare, impl, device, (name, why))
    return name.replace("product", "products") if impl == "eager" else name, why


def _kind(adapter: FrozenAdapter) -> str:
    """What tables know an adapter by.

    Entries are of `frozen_linear` itself: what it freezes forms `D W` at each call, keeps z, and
    has no pass of few rows, so that its times say little here.
    """
    if adapter.reads_output or not adapter.rank:
        return "plain"
    return "lora" if adapter.is_linear else "folded"


def _check_adapter(x, weight, adapter) -> None:
    if not isinstance(adapter, FrozenAdapter):
        raise TypeError(f"{NAME}: adapter must be a FrozenAdapter, got {type(adapter).__name__}")
    out_features, in_features = weight.shape
    read, rank = out_features if adapter.reads_output else in_features, adapter.down.shape[0]
    checks.tensor(NAME, "adapter.down", adapter.down, (None, read), x)
    checks.tensor(NAME, "adapter.up", adapter.up, (out_features, rank), x)
    checks.optional(NAME, "adapter.bias", adapter.bias, (out_features,), x)
    checks.optional(NAME, "adapter.bias_down", adapter.bias_down, (rank,), x)
    for name in ("up", "bias", "bias_down"):
        constant = getattr(adapter, name)
        if constant is not None and constant.dtype != adapter.dtype:
            raise TypeError(
                f"{NAME}: adapter.{name} is {constant.dtype}, but adapter.down is {adapter.dtype};"
                " the constants are of one dtype"
            )


def usual(
    case: Case, impl: str, weight: torch.Tensor | QuantizedWeight, device: torch.device
) -> tuple[str, str]:
    """`(strategy, reason)` where no table says otherwise; the reason may be empty."""
    choose = _eager_strategy if impl == "eager" else _fused_strategy
    return choose(case, weight, device)


def _eager_strategy(case, weight, device) -> tuple[str, str]:
    suffix, why = base.packed_strategy(weight, case.rows)
    why = why.removeprefix(" and ")
    if suffix in ("", "_weight_only") and _fits_one_call(case, weight, device):
        also = f" and {why}" if why else ""
        return "one_call" + suffix, f"one compiled pass serves few rows of bf16{also}"
    return "products" + suffix, why


def _fits_one_call(case, weight, device) -> bool:
    most = frozen.most_few_rows(case.torch_dtype, device, weight)
    return 0 < case.rows <= most and case.in_features > 0


def _fused_strategy(case, weight, device) -> tuple[str, str]:
    rows, k, n, rank = case[1:5]
    packed, dtype = isinstance(weight, QuantizedWeight), case.torch_dtype
    if not rank:
        if not packed:
            return "product", "there is no adapter"
        suffix, why = packed_choice.product(weight, rows, 0, dtype, device)
        return "product" + suffix, why
    if packed:
        strategy, why = packed_choice.lora_strategy(weight, rows, rank, dtype, device)
    else:
        strategy, why = tuning.lora_strategy(rows, k, n, rank, False, dtype, device)
    if case.op == FROZEN + "plain":
        how = "_" + strategy.removeprefix("split_") if packed else ""
        return "product" + how, "the adapter reads the layer's output"
    if case.op == FROZEN + "folded" and strategy == "one_pass":
        return "split", "an activation stands between the adapter's products"
    return strategy, why


def constants(adapter: FrozenAdapter) -> tuple[torch.Tensor | None, ...]:
    """Its tensors, in the order in which the operator takes them."""
    return adapter.down, adapter.up, adapter.bias, adapter.bias_down
