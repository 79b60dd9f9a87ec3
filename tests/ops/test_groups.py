"""Groups: the values of the single calls with the same seed, from one operation over one x."""

import pytest
import torch

import artemis_kernels
from artemis_kernels import QuantizedWeight
from tests import kit
from tests.ops.groups import (
    BIASES,
    BOTH,
    IN,
    KEYS,
    NARROW,
    OUT,
    assert_close,
    gradients_like,
    members_of,
    outcome,
    single_calls,
    truth,
)
from tests.ops.operations import ADAPTER, BF16, BLOCKER, DOUBLE, LORA, SINGLE

LISTS = {"weight": "weights", "bias": "biases", "scale": "scales", "down": "downs", "up": "ups"} | {
    "bias_down": "biases_down", "bias_up": "biases_up",
}  # fmt: skip


def grouped(operation, x, members, **options):
    lists = {LISTS.get(name, name): [member[name] for member in members] for name in members[0]}
    function = getattr(artemis_kernels, f"{operation.name}_group")
    return function(x, **lists, **options)


IMPLS = ["eager", "reference"] + ["triton"] * (BLOCKER is None)


@BOTH
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("packed", [(), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("features", [IN, NARROW])
def test_the_values_of_the_single_calls(operation, impl, p, packed, features):
    """Ranks, widths and sizes differ, weights are mixed, and one output may go unused."""
    if impl == "triton" and (packed or features == NARROW or operation is ADAPTER and p):
        pytest.skip("interpreted: slow, and single calls stand behind it")
    x, members = members_of(operation, SINGLE, features=features)
    for index in packed:
        weight = members[index]["weight"]
        members[index]["weight"] = QuantizedWeight.quantize(weight, activation_bits=8)
    options = {"impl": impl, "dropout_p": p, "seed": 7}
    dys = [torch.randn(40, n) for n in OUT]
    for used in (dys, [dys[0], None, dys[2]], [None, dys[1], dys[2]], [None, dys[1], None]):
        wanted = outcome(single_calls, operation, x, members, used, **options)
        actual = outcome(grouped, operation, x, members, used, **options)
        assert_close(actual, wanted, 1e-5)


@BOTH
@pytest.mark.parametrize("dtype", [SINGLE, BF16], ids=str)
@pytest.mark.parametrize("features", [IN, NARROW])
def test_accuracy(operation, dtype, features):
    """The accuracy rule for dX, which sums over members, and every other gradient."""
    x, members = members_of(operation, dtype, rows=130, features=features)
    dys = gradients_like(members, dtype, 130)
    options = {"dropout_p": 0.25, "seed": 7}
    exact = truth(operation, x, members, dys, **options)
    plain = outcome(single_calls, operation, x, members, dys, impl="reference", **options)
    actual = outcome(grouped, operation, x, members, dys, **options)
    for name, value in exact.items():
        kit.assert_accurate(actual[name], value, plain[name], dtype, c=1.25, name=name)


@BOTH
@pytest.mark.parametrize("features", [IN, NARROW])
def test_only_what_is_asked_for(operation, features):
    x, members = members_of(operation, SINGLE, features=features)
    dys = gradients_like(members, SINGLE)
    every = outcome(grouped, operation, x, members, dys, dropout_p=0.25, seed=3)
    for frozen in (("x",), (KEYS[operation][0],), (KEYS[operation][1],), ("x", *KEYS[operation])):
        some = outcome(grouped, operation, x, members, dys, frozen, dropout_p=0.25, seed=3)
        for name, value in some.items():
            if value is not None:
                torch.testing.assert_close(value, every[name], rtol=1e-5, atol=1e-5)


@BOTH
def test_a_reader_that_passes_no_gradient_on(operation):
    """Its node stands in the graph all the same, so the backward runs, with nothing to do."""

    class Silent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    x, members = members_of(operation, SINGLE)
    x.requires_grad_()
    ys = grouped(operation, x, members)
    (sum(Silent.apply(y).sum() for y in ys) + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("dtype", [SINGLE, BF16], ids=str)
def test_a_narrow_x_mixes_folded_and_plain_members(dtype):
    """What the tests above rely on."""
    x, members = members_of(ADAPTER, dtype, features=NARROW)
    x.requires_grad_()
    lists = {LISTS.get(name, name): [m[name] for m in members] for name in members[0]}
    strategy = artemis_kernels.explain("adapter_linear_group", x, **lists).strategy
    assert strategy == "joined: folded + plain + folded"


def test_x_is_rounded_once(monkeypatch):
    from artemis_kernels.core import eight_bit_rows

    x, members = members_of(LORA, SINGLE)
    for member in members:
        member["weight"] = QuantizedWeight.quantize(member["weight"], activation_bits=8)
    rounded, original = [], eight_bit_rows.round_rows
    for module in ("core.eight_bit", "ops.rounding"):
        monkeypatch.setattr(
            f"artemis_kernels.{module}.round_rows",
            lambda *arguments: rounded.append(1) or original(*arguments),
        )
    grouped(LORA, x, members)
    assert len(rounded) == 1


@BOTH
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_inside_torchs_machinery(operation, p):
    """One graph without breaks, forward and backward, an unused output included."""
    torch._dynamo.reset()
    x, members = members_of(operation, SINGLE)
    dys = [*gradients_like(members, SINGLE)[:2], None]

    def compiled(operation, x, members, **options):
        return torch.compile(grouped, fullgraph=True, backend="aot_eager")(
            operation, x, members, **options
        )

    seed = {"dropout_p": p, "seed": torch.tensor([3])}
    wanted = outcome(grouped, operation, x, members, dys, **seed)
    assert_close(outcome(compiled, operation, x, members, dys, **seed), wanted, 1e-6)
    torch._dynamo.reset()


@BOTH
def test_opcheck(operation):
    x, members = members_of(operation, SINGLE)
    fields = ("weight", *KEYS[operation], *BIASES[operation])
    flat = []
    for member in members:
        scale = member["scale"] if isinstance(member["scale"], torch.Tensor) else None
        tensors = [member[name] for name in fields] + [scale]
        flat += [t if t is None else t.requires_grad_() for t in tensors] + [None, None]
        flat[-len(fields) - 3].requires_grad_(False)
    kind, strategies = ("", ["addmm"] * 3) if operation is LORA else (
        "gelu", ["folded", "plain", "folded"]
    )  # fmt: skip
    torch.library.opcheck(
        getattr(torch.ops.artemis, f"{operation.name}_group").default,
        (x.requires_grad_(), flat, [1.0, 0.5, 1.0], kind, 0.25, torch.tensor([3]), "eager",
         strategies),
    )  # fmt: skip


@BOTH
def test_vmap(operation):
    """Over x, and over a member's matrix: what a loop gives."""
    x, members = members_of(operation, SINGLE)
    pairs = torch.vmap(lambda x: grouped(operation, x, members))(torch.stack((x, -x)))
    for pair, one, other in zip(
        pairs, grouped(operation, x, members), grouped(operation, -x, members), strict=True
    ):
        torch.testing.assert_close(pair, torch.stack((one, other)))
    name, members = KEYS[operation][0], [dict(member) for member in members]

    def second(matrix):
        members[1][name] = matrix
        return grouped(operation, x, members)[1]

    matrices = torch.randn(2, *members[1][name].shape)
    torch.testing.assert_close(torch.vmap(second)(matrices), torch.stack([*map(second, matrices)]))


@BOTH
def test_leading_dimensions_autocast_and_the_meta_device(operation):
    x, members = members_of(operation, SINGLE)
    flat = grouped(operation, x, members)
    for y, wanted in zip(grouped(operation, x.view(4, 10, IN), members), flat, strict=True):
        assert torch.equal(y.view(40, -1), wanted)
    with torch.autocast("cpu", BF16):
        for y, wanted in zip(grouped(operation, x, members), flat, strict=True):
            assert y.dtype == BF16 and (y - wanted).norm() < 0.03 * wanted.norm()
    meta = [
        {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in member.items()}
        for member in members
    ]
    for y, wanted in zip(grouped(operation, x.to("meta"), meta), flat, strict=True):
        assert (y.shape, y.dtype) == (wanted.shape, wanted.dtype)
    empty = grouped(operation, x[:0], members)
    assert [tuple(y.shape) for y in empty] == [(0, n) for n in OUT]


@BOTH
def test_explain(operation):
    """The costs of the single calls, x read once; the same bits from impl and its reason."""
    x, members = members_of(operation, SINGLE)
    explained = grouped(operation, x, members)
    assert len(explained) == 3
    lists = {LISTS.get(n, n): [member[n] for member in members] for n in members[0]}
    name = f"{operation.name}_group"
    choice = artemis_kernels.explain(name, x, **lists)
    singles = [artemis_kernels.explain(operation.name, x, **m).cost for m in members]
    assert choice.op == name and choice.impl == "eager" and choice.strategy.startswith("joined")
    assert choice.cost.flops == sum(cost.flops for cost in singles)
    assert choice.cost.bytes == sum(cost.bytes for cost in singles) - 2 * x.nbytes
    reference = artemis_kernels.explain(name, x, impl="reference", **lists)
    assert reference.strategy.startswith("each")


@BOTH
def test_refusals(operation):
    x, members = members_of(operation, SINGLE)
    name, first = f"{operation.name}_group", KEYS[operation][0]
    short = LISTS.get(first, first)
    lists = {LISTS.get(n, n): [member[n] for member in members] for n in members[0]}
    function = getattr(artemis_kernels, name)
    with pytest.raises(ValueError, match=f"{name}: {short} must hold 3 values, got 2"):
        function(x, **lists | {short: lists[short][:2]})
    with pytest.raises(ValueError, match="at least one member"):
        function(x, **{key: [] for key in lists})
    members[1][first] = members[1][first].to(DOUBLE).long()
    with pytest.raises(TypeError, match=f"{name}: member 1: {first} must be a floating-point"):
        grouped(operation, x, members)
