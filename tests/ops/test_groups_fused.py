"""Groups in kernels: strategies forced, as the chooser would not at such small sizes."""

import pytest
import torch

import artemis_kernels
from artemis_kernels import QuantizedWeight
from artemis_kernels.core.device import CHIPS
from artemis_kernels.ops import members as shared
from tests.kit import Sizes
from tests.ops.groups import (
    BIASES,
    BOTH,
    IN,
    KEYS,
    assert_close,
    gradients_like,
    members_of,
    outcome,
    single_calls,
    truth,
)
from tests.ops.operations import ADAPTER, HALF, INTERPRETED, LORA, SINGLE

pytestmark = INTERPRETED
ROWS = 19
MIXED = {
    LORA: (["split"] * 3, ["vendor", "split", "vendor"]),
    ADAPTER: (["folded"] * 3, ["folded_vendor", "plain", "folded"], ["plain"] * 3),
}
CASES = pytest.mark.parametrize(
    ("operation", "strategies"),
    [(operation, strategies) for operation in MIXED for strategies in MIXED[operation]],
    ids=str,
)


def flat(operation, members) -> tuple[list, list[float]]:
    """The operator's operands and numeric scales."""
    operands, scales = [], []
    for member in members:
        scale = member["scale"]
        tensor = scale if isinstance(scale, torch.Tensor) else None
        scales.append(1.0 if tensor is not None else scale)
        weight, quantizers = member["weight"], [None, None]
        if isinstance(weight, QuantizedWeight):
            weight, quantizers = weight.data, [weight.scale, weight.offset]
        names = (*KEYS[operation], *BIASES[operation])
        operands += [weight, *(member[name] for name in names), tensor, *quantizers]
    return operands, scales


def forced(strategies):
    """`run` of `outcome`: the operator of a group by these strategies."""

    def run(operation, x, members, dropout_p, seed):
        operands, scales = flat(operation, members)
        seed = torch.tensor([seed]) if dropout_p else None
        kind = "" if operation is LORA else "gelu"
        operator = getattr(torch.ops.artemis, f"{operation.name}_group")
        return operator(x, operands, scales, kind, dropout_p, seed, "triton", strategies)

    return run


@CASES
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_the_values_of_the_reference(operation, strategies, p):
    """All gradients; ranks, widths and biases differ, scales too; an output may go unused."""
    x, members = members_of(operation, SINGLE, rows=ROWS)
    dys = gradients_like(members, SINGLE, ROWS)
    for used in (dys, [None, dys[1], dys[2]], [None, dys[1], None]):
        options = {"dropout_p": p, "seed": 7}
        wanted = outcome(single_calls, operation, x, members, used, impl="reference", **options)
        actual = outcome(forced(strategies), operation, x, members, used, **options)
        assert_close(actual, wanted, 1e-5)


@BOTH
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_a_few_rows_join_without_a_dot(operation, p, launched):
    """One shrink for all, then a matvec a member; a mask is drawn by the shrink with a dot."""
    x, members = members_of(operation, SINGLE, rows=4)
    strategies = ["split" if operation is LORA else "folded"] * 3
    with torch.no_grad():
        ys = forced(strategies)(operation, x, members, p, 7)
        assert launched == ["_shrink" if p else "_shrink_rows", *["_matvec"] * 3]
        wanted = single_calls(operation, x, members, impl="reference", dropout_p=p, seed=7)
    for y, one in zip(ys, wanted, strict=True):
        torch.testing.assert_close(y, one, rtol=1e-5, atol=1e-5)


@CASES
def test_only_what_is_asked_for(operation, strategies):
    x, members = members_of(operation, SINGLE, rows=ROWS)
    dys = gradients_like(members, SINGLE, ROWS)
    options = {"dropout_p": 0.25, "seed": 3}
    first, second = KEYS[operation]
    for frozen in (("x",), (first,), (second, "scale"), ("x", first, *BIASES[operation])):
        wanted = outcome(
            single_calls, operation, x, members, dys, frozen, impl="reference", **options
        )
        actual = outcome(forced(strategies), operation, x, members, dys, frozen, **options)
        assert_close(actual, wanted, 1e-4)  # a scale's gradient may nearly cancel


@BOTH
def test_wide_members(operation):
    """Beyond what one read of dY takes, where rows of z and of dz in wider matrices matter most."""
    members = [operation.operands(Sizes(9, 24, n, r), SINGLE) for n, r in ((20, 70), (12, 4))]
    x = members[0]["x"]
    members = [{n: t for n, t in member.items() if n != "x"} for member in members]
    dys = gradients_like(members, SINGLE, 9)
    options = {"dropout_p": 0.25, "seed": 3}
    wanted = outcome(single_calls, operation, x, members, dys, impl="reference", **options)
    strategies = ["split" if operation is LORA else "folded"] * 2
    actual = outcome(forced(strategies), operation, x, members, dys, **options)
    assert_close(actual, wanted, 1e-5)


@BOTH
def test_sixteen_bits(operation):
    """As far from the fp64 truth as the single calls are. (bf16 products cannot be interpreted.)"""
    x, members = members_of(operation, HALF, rows=ROWS)
    dys = gradients_like(members, HALF, ROWS)
    options = {"dropout_p": 0.25, "seed": 7}
    exact = truth(operation, x, members, dys, **options)
    actual = outcome(forced(MIXED[operation][1]), operation, x, members, dys, **options)
    for name, value in exact.items():
        error = (actual[name].double() - value).norm() / value.norm()
        assert error < 2e-3, f"{name}: {error:.2g}"


def test_sums_that_leave_fp16():
    """On their way to dD, larger than it where weights are small: those of folded members."""
    x, members = members_of(ADAPTER, HALF, rows=ROWS)
    x, members = x * 8000, [m | {"weight": m["weight"] / 1000} for m in members]
    dys = [4 * dy for dy in gradients_like(members, HALF, ROWS)]
    options = {"dropout_p": 0.0, "seed": 7}
    exact = truth(ADAPTER, x, members, dys, **options)
    actual = outcome(forced(["folded"] * 3), ADAPTER, x, members, dys, **options)
    for name in ("down0", "down1", "down2"):
        error = (actual[name].double() - exact[name]).norm() / exact[name].norm()
        assert error < 5e-3, f"{name}: {error:.2g}"


@BOTH
@pytest.mark.parametrize("how", ["int8", "fp8", "dense"])
def test_packed_bases(operation, how, launched):
    """x is rounded once; the values, dX summed in one buffer among them, are the single calls'."""
    x, members = members_of(operation, SINGLE, rows=ROWS)
    for member in members[:2]:
        format = "fp8" if how == "fp8" else "int8"
        member["weight"] = QuantizedWeight.quantize(member["weight"], format, activation_bits=8)
    joined = "split" if operation is LORA else "folded"
    second = "split" if operation is LORA else "plain"
    strategies = [f"{joined}_{how}", f"{second}_{how}", joined]
    dys = gradients_like(members, SINGLE, ROWS)

    def one_by_one(operation, x, members, **options):
        each = zip(members, strategies, strict=True)
        return [forced([s])(operation, x, [member], **options)[0] for member, s in each]

    options = {"dropout_p": 0.0, "seed": 7}
    wanted = outcome(one_by_one, operation, x, members, dys, **options)
    launched.clear()
    actual = outcome(forced(strategies), operation, x, members, dys, **options)
    assert_close(actual, wanted, 1e-5)
    assert launched.count("_round_rows") == (0 if how == "dense" else 1 + 2)  # x, and each dY


@CASES
def test_launches_are_those_that_explain_tells(operation, strategies, launched):
    joining = [
        (index, strategy)
        for index, strategy in enumerate(strategies)
        if strategy != "plain"
    ]  # fmt: skip
    if not joining:
        pytest.skip("plain members share no launch")
    x, members = members_of(operation, SINGLE, rows=ROWS)
    members = [members[index] for index, _ in joining]
    strategies = [strategy for _, strategy in joining]
    outputs = shared.outputs_of(x, [member[KEYS[operation][1]] for member in members])
    dys = gradients_like(members, SINGLE, ROWS)
    run = forced(strategies)
    run(operation, x, members, dropout_p=0.0, seed=7)
    ahead = len([name for name in launched if name != "_expand"])
    launched.clear()
    outcome(run, operation, x, members, dys, dropout_p=0.0, seed=7)
    both = len([name for name in launched if name != "_expand"])
    told = shared.launches(strategies, outputs, True, CHIPS["interpreter"])
    assert (ahead, both - ahead) == told


def test_explain():
    lists = {"weights": [torch.randn(48, IN)] * 2, "ups": [torch.randn(48, 8)] * 2}
    lists["downs"] = [torch.randn(8, 48)] * 2
    x = torch.randn(64, IN)
    choice = artemis_kernels.explain("adapter_linear_group", x, impl="triton", **lists)
    assert choice.strategy == "joined: folded + folded"
    assert "1 launches forward, 6 backward (single calls: 2, 8)" in choice.reason
    single = artemis_kernels.explain(
        "adapter_linear", x, *(lists[name][0] for name in ("weights", "downs", "ups")),
        impl="triton",
    )  # fmt: skip
    assert choice.cost.bytes == 2 * single.cost.bytes - x.nbytes


@BOTH
def test_opcheck(operation):
    x, members = members_of(operation, SINGLE, rows=5)
    operands, scales = flat(operation, members)
    learning = [t if t is None else t.detach().requires_grad_() for t in operands]
    for place in range(0, len(learning), len(learning) // 3):
        learning[place].requires_grad_(False)
    torch.library.opcheck(
        getattr(torch.ops.artemis, f"{operation.name}_group").default,
        (x.requires_grad_(), learning, scales, "" if operation is LORA else "gelu", 0.25,
         torch.tensor([3]), "triton", MIXED[operation][1]),
    )  # fmt: skip
