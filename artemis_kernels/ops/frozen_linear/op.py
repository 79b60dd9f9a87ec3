"""`frozen_linear`: an adapted layer at inference, its constants prepared, in one call."""

import functools
from collections.abc import Callable

import torch

from ...core import base, call, checks, frozen
from ...core.frozen import FrozenAdapter
from ...core.quantized import QuantizedWeight
from ...core.registration import define
from ...core.types import Choice, Cost, Scale
from ..bases import held
from . import eager, reference
from .plan import NAME, asks_for_gradient, constants, in_forward_mode, plan
from .plan import usual as usual  # the tuner asks an operation for it


def frozen_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    adapter: FrozenAdapter,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """Return what `lora_linear` or `adapter_linear` computes, from constants made beforehand.

    `y1 = x Wᵀ + bias`, then `y1 + scale · act(z) Gᵀ` with `z = x Fᵀ + c` or `z = y1 Fᵀ + c`
    (docs/frozen_linear.md).

    Args:
        x: [..., in] of the constants' dtype (autocast's, where that is on).
        weight: [out, in] of that dtype, or a `QuantizedWeight`.
        adapter: the constants, for this very weight.
        impl: None for the best that applies, or "triton", "eager", "reference".

    Returns:
        [..., out]; there are no gradients.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, naming it; or one
            that asks for a gradient.
        Unavailable: a path asked for by `impl` that cannot run, saying why.
    """
    path = plan(x, weight, adapter, impl=impl)
    dtype = call.compute_dtype(x)
    x = x.to(dtype)
    with call.outside_autocast(x):
        if path.impl == "reference":
            return reference.frozen_linear(
                x, call.dense_weight(weight, dtype), *constants(adapter), adapter.scale,
                adapter.activation, adapter.reads_output,
            ).to(dtype)  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])
        if type(x) is torch.Tensor and not _is_watched():
            weight = weight.to(dtype) if isinstance(weight, torch.Tensor) else weight
            y = computed(rows, weight, adapter, path.impl, path.strategy)
        else:
            data, quantizers = call.weight_tensors(weight, dtype)
            scale = Scale.of(adapter.scale)
            y = _operator(
                rows, data, *constants(adapter), scale.number, scale.tensor, adapter.activation,
                adapter.reads_output, path.impl, path.strategy, *quantizers,
            )  # fmt: skip
    return y.reshape(*x.shape[:-1], weight.shape[0])


class FrozenLinear:
    """`frozen_linear` of one weight and one adapter: checked once, for few rows at no overhead.

    Args:
        weight, adapter, impl: as in `frozen_linear`. They are held, and serve as they are now.

    Raises:
        ValueError, TypeError: tensors that do not fit together.
    """

    def __init__(
        self,
        weight: torch.Tensor | QuantizedWeight,
        adapter: FrozenAdapter,
        *,
        impl: str | None = None,
    ):
        x = adapter.down.new_empty(1, weight.shape[1])
        checks.same_dtype(NAME, "weight", weight, x.dtype)
        most = frozen.most_few_rows(adapter.dtype, x.device, weight)
        with torch.no_grad():
            paths = [plan(x.expand(m, -1), weight, adapter, impl=impl) for m in range(1, most + 2)]
        self.weight, self.adapter, self.impl = weight, adapter, impl
        in_one = [path.strategy.startswith("one_call") for path in paths]
        self._most_rows = in_one.index(False)
        self._few_rows = frozen.FewRows(weight, adapter) if self._most_rows else None
        # Of so many rows: the path, what takes it, and the address of the numbers that this reads.
        # Checking and choosing take 80 µs.
        self._planned = 0, paths[0], None, 0

    def __reduce__(self):
        """A copy is made anew: where it is unpickled there may be other passes."""
        return functools.partial(type(self), impl=self.impl), (self.weight, self.adapter)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        if not self._takes(x):
            return frozen_linear(x, self.weight, self.adapter, impl=self.impl)
        rows = x.numel() // x.shape[-1]
        if rows <= self._most_rows:
            return self._few_rows(x)
        planned = self._planned  # once: another thread may be here
        packed = isinstance(self.weight, QuantizedWeight)
        address = (self.weight.data if packed else self.weight).data_ptr()
        if rows != planned[0] or address != planned[3]:
            path = plan(x, self.weight, self.adapter, impl=self.impl)
            planned = rows, path, self._prepared(path, rows), address
            self._planned = planned
        _, path, run, _ = planned
        if path.impl == "reference":
            return frozen_linear(x, self.weight, self.adapter, impl=self.impl)
        y = run(x.reshape(rows, x.shape[-1]))
        return y.reshape(*x.shape[:-1], y.shape[1])

    def _prepared(self, path: call.Path, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """What computes y [rows, out] of x [rows, in] by a path."""
        if path.impl == "triton" and path.strategy in ("split", "split_weight_only"):
            from ..few_rows import adapted  # imports triton

            if (run := adapted.prepared(self.weight, self.adapter, rows)) is not None:
                return run
        return lambda x: computed(x, self.weight, self.adapter, path.impl, path.strategy)

    def _takes(self, x: torch.Tensor) -> bool:
        """Whether x is as planned for but for its rows, and there is no more to see to."""
        return (
            type(x) is torch.Tensor
            and x.dtype is self.adapter.dtype
            and x.device == self.adapter.down.device
            and x.dim() > 0
            and x.numel() > 0
            and x.shape[-1] == self.weight.shape[1]
            and not in_forward_mode()
            and not torch.is_autocast_enabled(x.device.type)
            and not _is_watched()
            and asks_for_gradient(x, self.weight, self.adapter) is None
        )


def _is_watched() -> bool:
    """Whether a compiler, tracer, transform or mode must see an operator: it costs 15 µs a call."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if torch._C._are_functorch_transforms_active():  # x, or what it meets, may have no address
        return True
    return torch._C._len_torch_dispatch_stack() > 0


def explain(x, weight, adapter, **options) -> Choice:
    """The path `frozen_linear` takes for these arguments, why, and what it costs."""
    path = plan(x, weight, adapter, **options)
    rows, size = x.numel() // max(x.shape[-1], 1), adapter.dtype.itemsize
    total = cost(rows, weight.shape[1], weight.shape[0], *adapter.down.shape, size)
    return Choice(NAME, *path, base.as_held(total, weight, size))


def cost(m: int, k: int, n: int, r: int, read: int, itemsize: int) -> Cost:
    """Each tensor read or written once; `read` is the width of what the adapter reads, k or n."""
    return Cost(
        flops=2 * m * k * n + 2 * m * r * (read + n),
        bytes=itemsize * (m * k + k * n + m * n + r * (read + n)),
    )


def computed(x, weight, adapter, impl, strategy) -> torch.Tensor:
    """y [M, out] for x [M, in] by a strategy, unchecked."""
    most = frozen.most_few_rows(x.dtype, x.device, weight)  # a graph may be traced elsewhere
    if strategy.startswith("one_call") and len(x) <= most:
        return frozen.FewRows(weight, adapter)(x)
    quantizers = (None, None)
    if isinstance(weight, QuantizedWeight):
        weight, quantizers = weight.data, (weight.scale, weight.offset)
    weight = held(impl, weight, *quantizers, strategy)
    if impl == "eager":
        return eager.forward(x, weight, adapter)
    from . import fused  # imports triton

    return fused.forward(x, weight, adapter, strategy)


def _kernel(
    x, weight, down, up, bias, bias_down, scale, scale_tensor, activation, reads_output, impl,
    strategy, weight_scale=None, weight_offset=None,
) -> torch.Tensor:  # fmt: skip
    factor = scale if scale_tensor is None else scale_tensor
    adapter = FrozenAdapter(down, up, bias, bias_down, factor, activation, reads_output)
    if weight_scale is not None:
        weight = QuantizedWeight.of_parts(weight, weight_scale, weight_offset)
    return computed(x, weight, adapter, impl, strategy)


_operator = define(
    f"{NAME}(Tensor x, Tensor weight, Tensor down, Tensor up, Tensor? bias, Tensor? bias_down, "
    "float scale, Tensor? scale_tensor, str activation, bool reads_output, str impl, "
    f"str strategy, {base.SCHEMA}) -> Tensor",
    _kernel,
    lambda x, weight, *rest: x.new_empty(x.shape[0], weight.shape[0]),
)
