"""`explain` tells the path that the call takes: the same function decides both."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import artemis_kernels
from artemis_kernels.core import device as device_facts
from artemis_kernels.core.device import Chip
from artemis_kernels.core.types import Choice, Cost
from artemis_kernels.ops.adapter_linear import op as adapter_op
from artemis_kernels.ops.bottleneck_adapter import op as bottleneck_op
from artemis_kernels.ops.lora_linear import op as lora_op
from tests.kit import SIZES, Sizes
from tests.ops.operations import ADAPTER, BF16, BOTTLENECK, LORA, OPERATIONS, SINGLE

MODULES = {LORA: lora_op, ADAPTER: adapter_op, BOTTLENECK: bottleneck_op}


@pytest.mark.parametrize("impl", [None, "eager", "triton"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_the_operator_gets_what_explain_says(operation, impl, monkeypatch):
    taken = []
    module = MODULES[operation]
    operator = module._operator

    def spy(*arguments):
        taken.append(arguments[-2:])
        return operator(*arguments)

    monkeypatch.setattr(module, "_operator", spy)
    for sizes in (SIZES, Sizes(200, 8, 8, 2), Sizes(2, 40, 200, 4)):
        tensors = operation.operands(sizes, SINGLE)
        for options in ({}, {"dropout_p": 0.5, "seed": 1}):
            choice = artemis_kernels.explain(operation.public, **tensors, impl=impl, **options)
            operation.public(**tensors, impl=impl, **options)
            assert taken.pop() == (choice.impl, choice.strategy)
            assert choice.impl == (impl or "eager")


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_explain_runs_nothing(operation):
    """Not even the generator moves; a name and the function itself are the same."""
    tensors = operation.operands(SIZES, SINGLE)
    state = torch.get_rng_state()
    by_name = artemis_kernels.explain(operation.name, **tensors, dropout_p=0.5)
    assert artemis_kernels.explain(operation.public, **tensors, dropout_p=0.5) == by_name
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(by_name, Choice) and by_name.op == operation.name
    for word in (operation.name, by_name.impl, by_name.strategy, by_name.reason, "GFLOP", "MB"):
        assert word in str(by_name)


def shapes_of(m: int, k: int, n: int, width: int) -> dict:
    """Meta-sized operands for `adapter_linear`: expanded, so that large ones cost nothing."""
    one = torch.zeros(1, 1)
    return {
        "x": one.expand(m, k),
        "weight": one.expand(n, k),
        "down": one.expand(width, n),
        "up": one.expand(n, width),
    }


@pytest.mark.parametrize(
    ("sizes", "trains", "strategy"),
    [
        # tokens, in, out: gate of a 2,048-wide Llama; folding pays from about 3,000 tokens
        pytest.param((1024, 2048, 5504, 64), True, "plain", id="gate-few-tokens"),
        pytest.param((8192, 2048, 5504, 64), True, "folded", id="gate-many-tokens"),
        # down: in > out, so the bottleneck on the narrow output is the cheaper one
        pytest.param((8192, 5504, 2048, 64), True, "plain", id="down-many-tokens"),
        # without gradients F is formed once and dD not at all
        pytest.param((1, 2048, 5504, 64), False, "plain", id="decode"),
        pytest.param((4096, 2048, 5504, 64), False, "folded", id="prefill"),
    ],
)
def test_eager_folds_where_it_takes_fewer_products(sizes, trains, strategy):
    tensors = shapes_of(*sizes)
    if trains:
        tensors["down"] = tensors["down"].detach().requires_grad_()
    choice = artemis_kernels.explain("adapter_linear", **tensors)
    assert (choice.impl, choice.strategy) == ("eager", strategy)
    assert "product" in choice.reason


def test_fold_or_plain_counts_multiply_adds():
    """At the break-even the two counts differ by less than one row's worth.

    In training by that and a twentieth, which folding may cost more.
    """
    k, n, width = 64, 256, 16
    for trains, passes, folds, worth in ((True, 3, 2, 1.05), (False, 1, 1, 1)):
        break_even = folds * k * n / (passes * (2 * worth * n - n - k))
        below, above = int(break_even), int(break_even) + 1
        assert adapter_op.fold_or_plain(below, k, n, width, trains)[0] == "plain"
        assert adapter_op.fold_or_plain(above, k, n, width, trains)[0] == "folded"


def test_no_gradient_means_no_training_cost():
    """`requires_grad` under `no_grad` is not training."""
    tensors = shapes_of(300, 64, 128, 8)
    tensors["down"] = tensors["down"].detach().requires_grad_()
    training = adapter_op.fold_or_plain(300, 64, 128, 8, True)[0]
    with torch.no_grad():
        inference = artemis_kernels.explain("adapter_linear", **tensors).strategy
    assert inference == adapter_op.fold_or_plain(300, 64, 128, 8, False)[0]
    assert artemis_kernels.explain("adapter_linear", **tensors).strategy == training


@pytest.mark.parametrize("dtype", [SINGLE, BF16], ids=str)
def test_cost_is_counted_from_the_shapes(dtype):
    size = dtype.itemsize
    m, k, n, r = 10, 20, 30, 4
    lora = artemis_kernels.explain("lora_linear", **LORA.operands(Sizes(m, k, n, r), dtype))
    assert lora.cost == Cost(
        flops=2 * m * k * n + 2 * m * r * k + 2 * m * r * n,
        bytes=size * (m * k + k * n + m * n + r * k + r * n),
    )
    tensors = BOTTLENECK.operands(Sizes(m, k, n, r), dtype, without=("residual",))
    alone = artemis_kernels.explain("bottleneck_adapter", **tensors).cost
    assert alone == Cost(flops=4 * m * k * r, bytes=size * (2 * m * k + 2 * k * r))
    tensors["residual"] = tensors["x"]
    apart = artemis_kernels.explain("bottleneck_adapter", **tensors).cost
    assert apart.bytes - alone.bytes == size * m * k
    plain = adapter_op.cost(m, k, n, r, size, folded=False)
    folded = adapter_op.cost(m, k, n, r, size, folded=True)
    assert plain.flops == 2 * m * k * n + 4 * m * n * r
    assert folded.flops == 2 * m * k * n + 2 * r * (m * k + k * n + m * n)
    assert plain.bytes - folded.bytes == size * m * n  # the base's output is read again


def test_autocast_decides_with_its_dtype():
    tensors = LORA.operands(SIZES, SINGLE)
    plain = artemis_kernels.explain("lora_linear", **tensors)
    with torch.autocast("cpu", dtype=BF16):
        assert artemis_kernels.explain("lora_linear", **tensors).cost.bytes * 2 == plain.cost.bytes


@pytest.mark.parametrize("name", ["sm_75", "sm_70", "sm_61"])
@pytest.mark.parametrize("dtype", [torch.float16, BF16, SINGLE], ids=str)
def test_a_gpu_too_old_for_the_kernels_takes_torchs_paths(name, dtype, monkeypatch):
    """And says why; operands are fake, on a GPU that is not here."""
    wanted = f"sm_80 or later.* {name}$"
    monkeypatch.setattr(device_facts, "chip", lambda device: Chip(name, 40, 1 << 16))
    with FakeTensorMode():
        x, weight, a, b = (
            torch.empty(sizes, dtype=dtype, device="cuda")
            for sizes in ((32, 64), (96, 64), (8, 64), (96, 8))
        )
        choice = artemis_kernels.explain("lora_linear", x, weight, a, b, 1.0)
        assert choice.impl == "eager" and re.search(wanted, choice.reason)
        with pytest.raises(artemis_kernels.Unavailable, match=wanted):
            artemis_kernels.explain("lora_linear", x, weight, a, b, 1.0, impl="triton")
