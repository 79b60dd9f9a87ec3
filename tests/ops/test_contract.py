"""What every operation promises beyond its arithmetic, on every path."""

import math

import pytest
import torch
from torch import func
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad, functional
from torch.utils.checkpoint import checkpoint

import artemis_kernels
from artemis_kernels import QuantizedWeight, Unavailable
from tests import kit
from tests.kit import SIZES, Sizes
from tests.ops.operations import (
    ADAPTER,
    BF16,
    BOTTLENECK,
    DOUBLE,
    HALF,
    LORA,
    OPERATIONS,
    SINGLE,
    Path,
    every_path,
    follow_reference,
)

EVERY_PATH = pytest.mark.parametrize(("operation", "path"), every_path(SINGLE))
EVERY_EAGER_PATH = pytest.mark.parametrize(
    ("operation", "strategy"),
    [pytest.param(op, s, id=f"{op}-{s}") for op in OPERATIONS for s in op.eager],
)
EVERY_OPERATION = pytest.mark.parametrize("operation", OPERATIONS, ids=str)

IN_DTYPE_OF_X = ("x", "weight", "bias", "residual")


def masking(path: Path) -> dict:
    """Dropout, where the path has it."""
    return {} if path.strategy == "one_pass" else {"dropout_p": 0.25, "seed": 11}


def leaves_of(tensors: kit.Tensors, wanted) -> kit.Tensors:
    return {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}


@EVERY_PATH
@pytest.mark.parametrize("rows", [5, 40])  # the compiled passes of bf16 take 16 and more
@pytest.mark.parametrize("dtype", [SINGLE, BF16], ids=str)
def test_a_pair_for_scale_is_the_product_of_both(operation, path, rows, dtype):
    if path.impl == "triton" and dtype == BF16:
        pytest.skip("the interpreter's bf16 products are wrong in silence")
    tensors = operation.operands(Sizes(rows, 6, 20, 3), dtype)
    run, options = operation.along(path), masking(path)
    dy = torch.randn_like(run(**tensors, **options))

    def of_a_pair(scale, **others):
        return run(scale=(-1.5, scale), **others)

    def of_the_product(scale, **others):
        return run(scale=-1.5 * scale, **others)

    wanted = kit.outcome(of_the_product, tensors, operation.trained, dy, **options)
    found = kit.outcome(of_a_pair, tensors, operation.trained, dy, **options)
    for name, value in wanted.items():
        error = (found[name] - value).norm() / value.norm()
        assert error < (1e-5 if dtype == SINGLE else 1e-2), f"{name}: {error:.2g}"


@EVERY_PATH
def test_every_subset_of_gradients(operation, path):
    """Each subset gives exactly its gradients, the same as all of them together give.

    Interpreted, the subsets of up to two and all but one are enough to be slow.
    """
    sizes = Sizes(5, 6, 4, 3)
    tensors = operation.operands(sizes, path.dtype)
    run, options = operation.along(path), masking(path)
    dy = torch.randn_like(run(**tensors, **options))
    every = kit.outcome(run, tensors, operation.trained, dy, **options)
    count = len(operation.trained)
    for wanted in kit.subsets(operation.trained):
        if path.impl == "triton" and 2 < len(wanted) < count - 1:
            continue
        some = kit.outcome(run, tensors, wanted, dy, **options)
        for name in wanted:
            torch.testing.assert_close(some[name], every[name], rtol=2e-5, atol=2e-5)


@EVERY_PATH
def test_saves_x_only_for_the_gradient_that_reads_it(operation, path):
    """Only the gradient of A or `down` needs x; where down reads y0, that is kept instead."""
    reader = "lora_a" if operation is LORA else "down"
    tensors = operation.operands(Sizes(7, 13, 11, 3), path.dtype)
    saved_sizes = {}
    for frozen in (False, True):
        wanted = [n for n in operation.trained if n != (reader if frozen else None)]
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            operation.along(path)(**leaves_of(tensors, wanted), **masking(path))
        saved_sizes[frozen] = [tuple(t.shape) for t in saved]
    x_like = tuple(tensors["x"].shape)
    y_like = (7, 11)
    plain = path.strategy == "plain"
    assert (x_like in saved_sizes[False]) == (not plain)
    assert (y_like in saved_sizes[False]) == plain
    assert x_like not in saved_sizes[True] and y_like not in saved_sizes[True]


@EVERY_PATH
def test_gradient_of_stride_zero(operation, path):
    """`.sum().backward()` hands over an expanded scalar."""
    tensors = operation.operands(SIZES, path.dtype)
    gradients = []
    for loss in (lambda y: y.sum(), lambda y: (y * torch.ones_like(y)).sum()):
        leaves = leaves_of(tensors, operation.trained)
        loss(operation.along(path)(**leaves, **masking(path))).backward()
        gradients.append({name: leaves[name].grad for name in operation.trained})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-5)


@EVERY_PATH
def test_expanded_input(operation, path):
    """One row seen as many: stride 0 along M."""
    tensors = operation.operands(SIZES, path.dtype)
    x = tensors["x"][:1]
    tensors["x"] = x.expand(SIZES.m, -1)
    wanted = [name for name in operation.trained if name != "x"]  # autograd sums a view's gradient
    repeated = tensors | {"x": x.repeat(SIZES.m, 1)}
    dy = torch.randn_like(operation.along(path)(**tensors, **masking(path)))
    actual, expected = (
        kit.outcome(operation.along(path), t, wanted, dy, **masking(path))
        for t in (tensors, repeated)
    )
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)


@EVERY_OPERATION
@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("leading", [(), (3,), (2, 0, 3), (2, 1, 3, 2)], ids=str)
def test_any_leading_dimensions(operation, impl, leading):
    """x of [..., in] is its rows, one after another, and so are the mask and the gradient."""
    rows = math.prod(leading)
    tensors = operation.operands(SIZES._replace(m=rows), SINGLE)
    shaped = tensors | {
        name: tensors[name].reshape(*leading, SIZES.k)
        for name in ("x", "residual")
        if name in tensors
    }
    options = {"dropout_p": 0.25, "seed": 11, "impl": impl}
    dy = torch.randn_like(operation.public(**tensors, **options))
    flat = kit.outcome(operation.public, tensors, operation.trained, dy, **options)
    dy = dy.reshape(*leading, dy.shape[-1])
    actual = kit.outcome(operation.public, shaped, operation.trained, dy, **options)
    assert actual["y"].shape == (*leading, dy.shape[-1])
    for name, value in flat.items():
        torch.testing.assert_close(actual[name].reshape(value.shape), value, rtol=1e-5, atol=1e-6)


@EVERY_PATH
def test_second_backward_over_a_retained_graph(operation, path):
    leaves = leaves_of(operation.operands(SIZES, path.dtype), operation.trained)
    wanted = [leaves[name] for name in operation.trained]
    y = operation.along(path)(**leaves, **masking(path))
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    for name, one, two in zip(
        operation.trained, first, torch.autograd.grad(y, wanted, dy), strict=True
    ):
        kit.assert_same_bits(two, one, name)


@EVERY_PATH
def test_a_second_derivative_is_refused(operation, path):
    """At once, and of a sum too, whose dY is a constant that hides it from autograd."""
    leaves = leaves_of(operation.operands(SIZES, path.dtype), operation.trained)
    y = operation.along(path)(**leaves, **masking(path))
    for loss in (y.sum(), y.square().sum()):
        with pytest.raises(Unavailable, match=f"^{operation.name}: .*impl='reference'"):
            torch.autograd.grad(loss, leaves["x"], create_graph=True)


@EVERY_OPERATION
def test_what_torch_makes_of_second_derivatives(operation):
    """The reference has them, so has no other path; a Jacobian needs none."""
    tensors = operation.operands(Sizes(2, 4, 3, 2), DOUBLE)
    x = tensors.pop("x")

    def summed(x, impl=None):
        return operation.public(x, **tensors, impl=impl).square().sum()

    def by_reference(x):
        return summed(x, "reference")

    for second in (functional.hessian, functional.hvp):
        with pytest.raises(Unavailable, match="second derivative"):
            second(summed, x, *((x,) if second is functional.hvp else ()))
    assert torch.autograd.gradgradcheck(by_reference, x.clone().requires_grad_())
    torch.testing.assert_close(functional.jacobian(summed, x), functional.jacobian(by_reference, x))


@EVERY_OPERATION
def test_derivatives_that_only_the_reference_has(operation):
    """By torch.func, and in forward mode of any tensor: refused in the operation's name."""
    tensors = operation.operands(Sizes(2, 4, 3, 2), DOUBLE)
    x = tensors["x"]

    def summed(x, impl=None):
        return operation.public(**tensors | {"x": x}, impl=impl).square().sum()

    def along_x(function):
        return lambda x: func.jvp(function, (x,), (x,))[1]

    wanted = functional.jacobian(summed, x)
    for transform in (func.grad, func.jacrev, func.jacfwd, along_x):
        with pytest.raises(Unavailable, match=f"^{operation.name}: .*impl='reference'"):
            transform(summed)(x)
        found = transform(lambda x: summed(x, "reference"))(x)
        torch.testing.assert_close(found, (wanted * x).sum() if transform is along_x else wanted)
    for name in operation.trained:
        with forward_ad.dual_level(), torch.no_grad():
            dual = forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
            with pytest.raises(Unavailable, match=f"^{operation.name}: .*impl='reference'"):
                operation.public(**tensors | {name: dual})


@pytest.mark.parametrize("name", ["lora_linear_group", "quantized_linear"])
def test_the_other_operations_refuse_them_as_well(name):
    tensors = LORA.operands(SIZES, SINGLE)
    x, weight = tensors["x"].requires_grad_(), tensors["weight"]

    def run(x):
        if name == "quantized_linear":
            return artemis_kernels.quantized_linear(x, QuantizedWeight.quantize(weight))
        parts = ([tensors[name]] * 2 for name in ("weight", "lora_a", "lora_b", "scale"))
        return artemis_kernels.lora_linear_group(x, *parts)[1]

    with pytest.raises(Unavailable, match=f"^{name}: .*second derivative"):
        torch.autograd.grad(run(x).sum(), x, create_graph=True)
    member = name.removesuffix("_group")  # torch.func meets a group's members one by one
    with pytest.raises(Unavailable, match=f"^{member}: .*forward mode or by torch.func"):
        func.grad(lambda x: run(x).sum())(x)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(Unavailable, match=f"^{name}: .*forward mode or by torch.func"):
            run(x)


@EVERY_OPERATION
def test_devices_without_operators(operation):
    """Refused by the call and by `explain` alike; the reference is torch, which runs there."""
    with FakeTensorMode():
        shapes = operation.shapes(SIZES)
        tensors = {name: torch.empty(shape, device="mps") for name, shape in shapes.items()}
        for call in (operation.public, operation.explained):
            for impl in (None, "eager"):
                with pytest.raises(Unavailable, match="'mps'.*impl='reference'"):
                    call(**tensors, scale=0.5, impl=impl)
        assert operation.reference(**tensors).device.type == "mps"


@EVERY_OPERATION
def test_the_reference_under_vmap(operation):
    """A seed for each: what a loop over them gives."""
    tensors, seeds = operation.operands(SIZES, SINGLE), torch.tensor([[1], [2], [3]])

    def run(seed=None):
        return operation.reference(**tensors, dropout_p=0.4, seed=seed)

    looped = torch.stack([run(seed) for seed in seeds])
    torch.testing.assert_close(torch.vmap(run)(seeds), looped)
    drawn = torch.vmap(lambda seed: run(), randomness="different")(seeds)
    assert not torch.equal(drawn[0], drawn[1])


@EVERY_PATH
def test_same_bits_every_time(operation, path):
    tensors = operation.operands(Sizes(129, 70, 65, 12), path.dtype)
    run, options = operation.along(path), masking(path)
    first, second = (kit.outcome(run, tensors, operation.trained, **options) for _ in range(2))
    kit.assert_same_outcome(second, first)


@EVERY_PATH
def test_writes_every_element_and_nothing_else(operation, path, guarded_allocations):
    """Outputs start as nan between guard bands; sizes leave a ragged last tile everywhere."""
    tensors = operation.operands(Sizes(35, 67, 33, 5), path.dtype)
    results = kit.outcome(operation.along(path), tensors, operation.trained, **masking(path))
    for name, value in results.items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize(("operation", "path"), every_path(SINGLE, HALF))
def test_large_magnitudes(operation, path):
    """Far above one, still finite: no intermediate overflows where plain torch's does not."""
    tensors = operation.operands(SIZES, path.dtype)
    tensors["x"] = tensors["x"] * (1e15 if path.dtype == SINGLE else 20)
    if operation is LORA:
        return follow_reference(operation, path, tensors)
    # In fp16 a large z is off by enough to cross the bend of an activation, whoever computes it.
    for activation in kit.ACTIVATIONS if path.dtype == SINGLE else ("identity",):
        follow_reference(operation, path, tensors, activation=activation)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@EVERY_PATH
def test_inf_and_nan_stay_in_their_row(operation, path, value):
    """A bad row is bad where the reference's is; the other rows keep their bits."""
    tensors = operation.operands(SIZES, path.dtype)
    run = operation.along(path)
    clean = run(**tensors)
    tensors["x"][4, 3] = value
    y, expected = run(**tensors), operation.reference(**tensors)
    assert (torch.isfinite(y) == torch.isfinite(expected)).all()
    others = torch.arange(SIZES.m) != 4
    torch.testing.assert_close(y[others], clean[others], rtol=0, atol=0)


@pytest.mark.parametrize(
    "dtypes",
    [
        pytest.param((BF16, SINGLE), id="fp32-adapter-on-bf16"),
        pytest.param((SINGLE, BF16), id="bf16-adapter-on-fp32"),
        pytest.param((SINGLE, DOUBLE), id="fp64-adapter-on-fp32"),
    ],
)
@EVERY_EAGER_PATH
def test_parameters_of_another_dtype(operation, strategy, dtypes):
    """The call runs in x's dtype; each gradient comes back in its parameter's own."""
    assert_mixed(operation, Path("eager", strategy, dtypes[0]), *dtypes)


@pytest.mark.parametrize("layout", kit.LAYOUTS)
@EVERY_EAGER_PATH
def test_fp32_parameters_on_bf16_in_any_layout(operation, strategy, layout):
    path = Path("eager", strategy, BF16)
    tensors = {
        name: t.to(BF16 if name in IN_DTYPE_OF_X else SINGLE)
        for name, t in operation.operands(Sizes(65, 40, 36, 8), DOUBLE).items()
    }
    laid = {
        name: t if t.dtype == BF16 or not t.dim() else layout(t) if t.dim() == 2 else kit.sliced(t)
        for name, t in tensors.items()
    }
    run = operation.along(path)
    truth = kit.outcome(run, tensors, operation.trained)
    found = kit.outcome(run, laid, operation.trained)
    for name, wanted in truth.items():  # by another product, perhaps, but the same numbers
        error = (found[name].double() - wanted.double()).norm()
        assert error <= 0.02 * wanted.double().norm(), name


@pytest.mark.parametrize(("operation", "path"), every_path(HALF))
def test_fp32_parameters_on_fp16(operation, path):
    assert_mixed(operation, path, HALF, SINGLE)


def assert_mixed(operation, path: Path, large: torch.dtype, small: torch.dtype) -> None:
    tensors = {
        name: t.to(large if name in IN_DTYPE_OF_X else small)
        for name, t in operation.operands(Sizes(65, 40, 36, 8), DOUBLE).items()
    }
    results = kit.outcome(operation.along(path), tensors, operation.trained, **masking(path))
    assert results["y"].dtype == large
    for name in operation.trained:
        assert results[name].dtype == tensors[name].dtype, name
    follow_reference(operation, path, tensors, **masking(path))


@pytest.mark.parametrize(("operation", "path"), every_path())
def test_fp32_scale_is_not_rounded(operation, path):
    """A learned gain moves by less than a 16-bit step; the branch must move with it."""
    tensors = operation.operands(Sizes(256, 32, 64, 8), path.dtype, without=("bias_up", "residual"))
    tensors["scale"] = torch.tensor(1.0)
    for name in ("weight", "bias"):
        if operation is LORA:
            tensors[name] = torch.zeros_like(tensors[name])
    unscaled = operation.reference(**kit.in_dtype(tensors, DOUBLE))
    tensors["scale"] = torch.tensor(1.0 + 0.4 * torch.finfo(BF16).eps)
    y = operation.along(path)(**tensors).double()
    if operation is not LORA:
        start = operation.reference(**kit.in_dtype(tensors, DOUBLE) | {"scale": 0.0})
        y, unscaled = y - start, unscaled - start
    measured = (y * unscaled).sum() / unscaled.square().sum()
    assert abs(measured - tensors["scale"]) < 0.1 * torch.finfo(BF16).eps


@EVERY_OPERATION
@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("base", [SINGLE, BF16], ids=str)
def test_autocast_equals_casting_by_hand(operation, impl, base):
    """Whether the base is held in x's dtype or in that of autocast."""
    tensors = operation.operands(SIZES, SINGLE)
    if "weight" in tensors:
        tensors["weight"] = tensors["weight"].to(base)
    options = {"dropout_p": 0.25, "seed": 11, "impl": impl}
    by_hand = {name: t.to(BF16) if name in IN_DTYPE_OF_X else t for name, t in tensors.items()}
    dy = torch.randn_like(operation.public(**by_hand, **options))
    expected = kit.outcome(operation.public, by_hand, operation.trained, dy, **options)
    leaves = leaves_of(tensors, operation.trained)
    with torch.autocast("cpu", dtype=BF16):
        y = operation.public(**leaves, **options)
    assert y.dtype == BF16
    kit.assert_same_bits(y.detach(), expected["y"])
    y.backward(dy)
    for name in operation.trained:
        gradient = leaves[name].grad
        assert gradient.dtype == SINGLE, name
        kit.assert_same_bits(gradient, expected[name].to(SINGLE), name)


@EVERY_OPERATION
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_replays_the_mask(operation, reentrant):
    """The seed is drawn from torch's generator, which checkpointing restores."""
    tensors = operation.operands(SIZES, SINGLE)
    gradients = []
    for saves_memory in (False, True):
        torch.manual_seed(5)
        leaves = leaves_of(tensors, operation.trained)

        def call(x, leaves=leaves):
            return operation.public(**leaves | {"x": x}, dropout_p=0.4)

        if saves_memory:
            y = checkpoint(call, leaves["x"], use_reentrant=reentrant)
        else:
            y = call(leaves["x"])
        y.square().sum().backward()
        gradients.append({name: leaves[name].grad for name in operation.trained})
    kit.assert_same_outcome(gradients[1], gradients[0])


@EVERY_EAGER_PATH
def test_gradcheck(operation, strategy):
    """The hand-written backward against finite differences, in fp64."""
    check_gradients(operation, operation.along(Path("eager", strategy, DOUBLE)))


@EVERY_OPERATION
def test_gradcheck_of_the_reference(operation):
    check_gradients(operation, operation.reference)


def check_gradients(operation, run) -> None:
    tensors = operation.operands(Sizes(3, 4, 5, 2), DOUBLE)
    names = list(tensors)
    values = [tensors[name].requires_grad_(name in operation.trained) for name in names]

    def function(*arguments):
        return run(**dict(zip(names, arguments, strict=True)), dropout_p=0.3, seed=2)

    assert torch.autograd.gradcheck(function, values, fast_mode=False)


@pytest.mark.parametrize("dtype", [SINGLE, BF16], ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@EVERY_EAGER_PATH
def test_fresh_adapter_changes_no_bit(operation, strategy, with_bias, dtype):
    """With B (or `up`, `bias_up`) zero the result is the base's, bit for bit."""
    without = () if with_bias else ("bias",)
    tensors = operation.operands(SIZES, dtype, without=without)
    for name in ("lora_b", "up", "bias_up"):
        if name in tensors:
            tensors[name] = torch.zeros_like(tensors[name])
    y = operation.along(Path("eager", strategy, dtype))(**tensors)
    if operation is BOTTLENECK:
        base = tensors["residual"]
    else:
        base = torch.nn.functional.linear(tensors["x"], tensors["weight"], tensors.get("bias"))
    assert torch.equal(y, base)


@pytest.mark.parametrize("operation", [LORA, ADAPTER], ids=str)
def test_conv1d_weight(operation):
    """GPT-2's Conv1D keeps (in, out) and hands over the transposed view."""
    tensors = operation.operands(SIZES, SINGLE)
    kept = tensors["weight"].t().contiguous()
    for strategy in operation.eager:
        path = Path("eager", strategy, SINGLE)
        follow_reference(operation, path, tensors | {"weight": kept.t()})
