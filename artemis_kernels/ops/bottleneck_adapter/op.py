"""`bottleneck_adapter`: checks, choice of path, operator, autograd, and the public function."""

import functools

import torch

from ...core import call, checks, tables, tuning
from ...core.registration import (
    Operation,
    by_place,
    define,
    differentiate,
    empty_like_needed,
    needed,
    once,
)
from ...core.strategies import Case, named
from ...core.types import Choice, Cost, Factor, Scale
from . import eager, reference

NAME = "bottleneck_adapter"
#: Of the kernels with all gradients, where no sum along `hidden` is split for want of rows.
LAUNCHES_BACK = {"row_block": 3, "two_launch": 4, "two_launch_one_read": 5}


def bottleneck_adapter(
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    *,
    bias_down: torch.Tensor | None = None,
    bias_up: torch.Tensor | None = None,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    scale: Factor = 1.0,
    residual: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Return `residual + scale · (dropout(act(x Dᵀ + b_d)) Uᵀ + b_u)`.

    Houlsby et al. (arXiv 1902.00751), §2.1, with the dropout on the bottleneck's units.

    Args:
        x: [..., hidden], floating. The call computes in x's dtype (autocast's under autocast) and
            accumulates in fp32; the result has that dtype.
        down: [width, hidden], any floating dtype; its gradient comes in that dtype.
        up: [hidden, width], likewise.
        bias_down: [width] or None.
        bias_up: [hidden] or None.
        activation: "relu", "gelu", "gelu_tanh", "silu" or "identity".
        dropout_p: probability in [0, 1) of dropping a unit of the bottleneck.
        seed: of the mask over [..., width]: an int, or a one-element int64 tensor on x's device;
            None draws one from torch's generator.
        scale: a float, a 0-d tensor, which receives a gradient, or a pair of a float and a tensor,
            whose product it is.
        residual: of x's shape, in x's dtype (any under autocast); None is x itself.
        impl: None for the best that applies, or "triton", "eager", "reference".

    Returns:
        x's shape. Gradients flow to x, residual, down, up, a tensor scale and the biases.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, naming it.
        Unavailable: a path asked for by `impl` that cannot run, saying why.
    """
    path = plan(x, down, up, bias_down=bias_down, bias_up=bias_up, activation=activation,
                dropout_p=dropout_p, seed=seed, scale=scale, residual=residual,
                impl=impl)  # fmt: skip
    dtype = call.compute_dtype(x)
    p, seed = call.dropout(dropout_p, seed, x)
    x = x.to(dtype)
    residual = None if residual is None else residual.to(dtype)
    scale = Scale.of(scale)
    with call.outside_autocast(x):
        if path.impl == "reference":
            shape = (*x.shape[:-1], down.shape[0])
            keep, keep_scale = call.reference_mask(shape, p, seed, x.device)
            small = (None if t is None else t.to(dtype) for t in (down, up, bias_down, bias_up))
            down, up, bias_down, bias_up = small
            return reference.bottleneck_adapter(
                x, down, up, scale.value, bias_down, bias_up, residual, activation, keep,
                keep_scale,
            ).to(dtype)  # fmt: skip
        hidden = x.shape[-1]
        y = _operator(
            x.reshape(-1, hidden), down, up, bias_down, bias_up,
            None if residual is None else residual.reshape(-1, hidden), scale.number,
            scale.tensor, activation, p, seed, path.impl, path.strategy,
        )  # fmt: skip
    return y.reshape(x.shape)


def plan(
    x, down, up, *, bias_down=None, bias_up=None, activation="gelu", dropout_p=0.0, seed=None,
    scale=1.0, residual=None, impl=None,
) -> call.Path:  # fmt: skip
    """Check the arguments of `bottleneck_adapter` and choose its path; runs nothing."""
    checks.input_tensor(NAME, x)
    hidden = x.shape[-1]
    checks.tensor(NAME, "down", down, (None, hidden), x)
    width = down.shape[0]
    checks.tensor(NAME, "up", up, (hidden, width), x)
    checks.optional(NAME, "bias_down", bias_down, (width,), x)
    checks.optional(NAME, "bias_up", bias_up, (hidden,), x)
    checks.optional(NAME, "residual", residual, tuple(x.shape), x)
    checks.scale(NAME, scale, x)
    checks.seed(NAME, seed, x)
    checks.options(NAME, dropout_p, impl, activation)
    dtype = call.compute_dtype(x)
    if residual is not None and not call.autocasts(x):
        checks.same_dtype(NAME, "residual", residual, dtype)
    impl, reason = call.implementation(NAME, impl, dtype, x.device, trains_weight=False)
    if impl == "reference":
        return call.Path(impl, "composed", reason)
    case = Case(
        NAME, call.rows(x), 0, hidden, width, named(dtype), trains=_trains(x, down),
        drops=dropout_p > 0,
    )  # fmt: skip
    strategy, why = tables.choice(case, impl, x.device, usual(case, impl, None, x.device))
    return call.Path(impl, strategy, f"{reason} and {why}" if why else reason)


def _trains(x: torch.Tensor, down: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or down.requires_grad)


def usual(case: Case, impl: str, weight: None, device: torch.device) -> tuple[str, str]:
    """`(strategy, reason)` where no table says otherwise; the reason may be empty."""
    if impl == "eager":
        return "addmm", ""
    dtype = case.torch_dtype
    hidden, width, trains = case.out_features, case.width, case.trains
    return tuning.bottleneck_strategy(case.rows, hidden, width, trains, dtype, device)


def explain(x, down, up, **options) -> Choice:
    """The path `bottleneck_adapter` takes for these arguments, why, and what it costs."""
    path = plan(x, down, up, **options)
    hidden, width = x.shape[-1], down.shape[0]
    rows, size = x.numel() // max(hidden, 1), call.compute_dtype(x).itemsize
    if path.impl == "triton" and _trains(x, down):
        moved = backward_cost(rows, hidden, width, size, path.strategy).bytes / 1e6
        launches = LAUNCHES_BACK[path.strategy]
        path = path._replace(reason=f"{path.reason}; backward: {launches} launches, {moved:.3g} MB")
    separate = options.get("residual") is not None
    return Choice(NAME, *path, cost(rows, hidden, width, size, separate))


def cost(m: int, hidden: int, width: int, itemsize: int, residual: bool) -> Cost:
    """Forward: two thin products; x (and a separate residual) read once, y written once."""
    return Cost(
        flops=4 * m * hidden * width,
        bytes=itemsize * ((3 if residual else 2) * m * hidden + 2 * hidden * width),
    )


def backward_cost(m: int, hidden: int, width: int, itemsize: int, strategy: str) -> Cost:
    """All gradients by a strategy of the kernels: four thin products; parts of sums not counted.

    x is read and dX written once, dY once for each launch that needs it; z is read in fp32, dz
    and h are written and read where two launches share them.
    """
    reads = {"row_block": 2, "two_launch": 3, "two_launch_one_read": 2}[strategy]
    shared = {"row_block": 2 * itemsize, "two_launch": 4 + itemsize, "two_launch_one_read": 4}
    return Cost(
        flops=8 * m * hidden * width,
        bytes=itemsize * ((2 + reads) * m * hidden + 4 * hidden * width)
        + m * width * (4 + 2 * shared[strategy]),
    )


@functools.cache
def _path(impl: str):
    """The module that implements `impl`; both have `forward` and `backward` of one signature."""
    if impl == "eager":
        return eager
    from . import fused  # imports triton

    return fused


def _forward(
    x, down, up, bias_down, bias_up, residual, scale, scale_tensor, activation, dropout_p, seed,
    impl, strategy,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    y, z = _path(impl).forward(
        x, down, up, bias_down, bias_up, residual, scale, scale_tensor, activation, dropout_p,
        seed, strategy,
    )  # fmt: skip
    return y, z.contiguous()


def _forward_fake(
    x, down, up, bias_down, bias_up, residual, scale, scale_tensor, activation, dropout_p, seed,
    impl, strategy,
):  # fmt: skip
    z_dtype = x.dtype if impl == "eager" else torch.float32
    return x.new_empty(x.shape), x.new_empty(x.shape[0], down.shape[0], dtype=z_dtype)


def _only_y(*arguments) -> torch.Tensor:
    return _forward(*arguments)[0]


def _backward(
    dy, x, down, up, bias_down, bias_up, z, scale, scale_tensor, activation, dropout_p, seed,
    impl, strategy, residual_is_x, needs,
) -> list[torch.Tensor]:  # fmt: skip
    gradients = _path(impl).backward(
        dy, x, down, up, bias_down, bias_up, z, scale, scale_tensor, activation, dropout_p, seed,
        strategy, residual_is_x, tuple(needs),
    )  # fmt: skip
    return needed(gradients, needs)


def _backward_fake(
    dy, x, down, up, bias_down, bias_up, z, scale, scale_tensor, activation, dropout_p, seed,
    impl, strategy, residual_is_x, needs,
):  # fmt: skip
    like = (dy.new_empty(dy.shape), down, up, scale_tensor, bias_down, bias_up)
    return empty_like_needed(like, needs)


_ARGUMENTS = (
    "Tensor x, Tensor down, Tensor up, Tensor? bias_down, Tensor? bias_up, Tensor? residual, "
    "float scale, Tensor? scale_tensor, str activation, float dropout_p, Tensor? seed, str impl, "
    "str strategy"
)
_operator = define(f"{NAME}({_ARGUMENTS}) -> Tensor", _only_y, lambda *a: _forward_fake(*a)[0])
_forward_operator = define(
    f"{NAME}_forward({_ARGUMENTS}) -> (Tensor, Tensor)", _forward, _forward_fake
)
_backward_operator = define(
    f"{NAME}_backward(Tensor dy, Tensor? x, Tensor down, Tensor up, Tensor? bias_down, "
    "Tensor? bias_up, Tensor z, float scale, Tensor? scale_tensor, str activation, "
    "float dropout_p, Tensor? seed, str impl, str strategy, bool residual_is_x, bool[] needs) "
    "-> Tensor[]",
    _backward,
    _backward_fake,
)


class _BottleneckAdapter(Operation):
    @staticmethod
    def forward(
        ctx, x, down, up, bias_down, bias_up, residual, scale, scale_tensor, activation,
        dropout_p, seed, impl, strategy,
    ):  # fmt: skip
        with Operation.below_autograd():
            y, z = _forward_operator(
                x, down, up, bias_down, bias_up, residual, scale, scale_tensor, activation,
                dropout_p, seed, impl, strategy,
            )  # fmt: skip
        need = ctx.needs_input_grad
        ctx.needs = (need[0], need[1], need[2], need[7], need[3], need[4])
        ctx.needs_residual = need[5]
        kept_x = x if need[1] else None
        ctx.save_for_backward(kept_x, down, up, bias_down, bias_up, z, scale_tensor, seed)
        ctx.options = (scale, activation, dropout_p, impl, strategy, residual is None)
        return y

    @staticmethod
    @once(NAME)
    def backward(ctx, dy):
        *operands, scale_tensor, seed = ctx.saved_tensors
        scale, activation, dropout_p, impl, strategy, residual_is_x = ctx.options
        with Operation.below_autograd():
            gradients = _backward_operator(
                dy, *operands, scale, scale_tensor, activation, dropout_p, seed, impl, strategy,
                residual_is_x, list(ctx.needs),
            )  # fmt: skip
        dx, ddown, dup, dscale, dbias_down, dbias_up = by_place(gradients, ctx.needs)
        dresidual = dy if ctx.needs_residual else None
        return (
            dx, ddown, dup, dbias_down, dbias_up, dresidual, None, dscale, None, None, None,
            None, None,
        )  # fmt: skip


differentiate(NAME, _BottleneckAdapter)
