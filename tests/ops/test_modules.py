"""The modules of `artemis_kernels.nn`: what they own, how they start, that they pass things on."""

import copy

import pytest
import torch
from torch import nn

import artemis_kernels
from artemis_kernels.nn import AdapterLinear, BottleneckAdapter, LoRALinear

BASES = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])


def trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


@BASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [LoRALinear, AdapterLinear], ids=lambda k: k.__name__)
def test_fresh_module_is_its_base(kind, dtype, bias):
    base = nn.Linear(12, 20, bias=bias, dtype=dtype)
    module = kind.from_linear(base, 4, dropout_p=0.5)
    x = torch.randn(3, 5, 12).to(dtype)
    assert torch.equal(module(x), base(x))
    assert torch.equal(module.eval()(x), base(x))


def test_how_first_matrices_are_drawn():
    """As the papers do: `down` normal(0, 0.02), A uniform up to 1/√in."""
    torch.manual_seed(0)
    down = BottleneckAdapter(512, 128).down
    assert down.mean().abs() < 5 * 0.02 / down.numel() ** 0.5
    assert down.std().item() == pytest.approx(0.02, rel=0.02)
    assert down.abs().max() > 4 * 0.02  # normal, not uniform
    lora_a = LoRALinear(nn.Linear(400, 4), 128).lora_a
    assert 0.99 / 20 < lora_a.abs().max() <= 1 / 20
    assert lora_a.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)


def test_fresh_bottleneck_is_its_residual():
    module, x, residual = BottleneckAdapter(12, 4), torch.randn(5, 12), torch.randn(5, 12)
    assert torch.equal(module(x), x)
    assert torch.equal(module(x, residual), residual)


def test_the_base_is_frozen_and_shared():
    base = nn.Linear(6, 8)
    lora, adapter = LoRALinear(base, 2), AdapterLinear(base, 2)
    assert lora.base is base and adapter.base is base
    assert trained(lora) == {"lora_a", "lora_b"}
    assert trained(adapter) == {"down", "up", "bias_down", "bias_up"}
    assert trained(AdapterLinear(base, 2, bias=False)) == {"down", "up"}
    base = nn.Linear(6, 8)
    assert trained(BottleneckAdapter.from_linear(base, 2)) == {"down", "up", "bias_down", "bias_up"}
    assert base.weight.requires_grad  # a bottleneck beside a layer does not touch it


def test_parameters_are_fp32_over_a_16_bit_base():
    base = nn.Linear(6, 8, dtype=torch.bfloat16)
    for module in (LoRALinear(base, 2), AdapterLinear(base, 2)):
        for parameter in (p for p in module.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter)
        y = module(torch.randn(5, 6, dtype=torch.bfloat16))
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        for name in trained(module):
            parameter = module.get_parameter(name)
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_parameters_are_fp32_whatever_torchs_default(default):
    """As in transformers' `from_pretrained(dtype=torch.bfloat16)`, which makes it the default."""
    base = nn.Linear(6, 8)
    torch.set_default_dtype(default)
    try:
        modules = LoRALinear(base, 2), AdapterLinear(base, 2), BottleneckAdapter(6, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    for module in modules:
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def filled(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def test_modules_compute_their_operations():
    x, residual = torch.randn(7, 6), torch.randn(7, 8)
    base = nn.Linear(6, 8)
    lora = filled(LoRALinear(base, 3, 0.5))
    assert torch.equal(
        lora(x),
        artemis_kernels.lora_linear(x, base.weight, lora.lora_a, lora.lora_b, 0.5, bias=base.bias),
    )
    adapter = filled(AdapterLinear(base, 3, activation="silu", scale=0.25))
    biases = {"bias_down": adapter.bias_down, "bias_up": adapter.bias_up}
    assert torch.equal(
        adapter(x),
        artemis_kernels.adapter_linear(
            x, base.weight, adapter.down, adapter.up, bias=base.bias, activation="silu",
            scale=0.25, **biases,
        ),
    )  # fmt: skip
    block = filled(BottleneckAdapter(8, 3, activation="relu", scale=2.0))
    biases = {"bias_down": block.bias_down, "bias_up": block.bias_up}
    assert torch.equal(
        block(x @ base.weight.T, residual),
        artemis_kernels.bottleneck_adapter(
            x @ base.weight.T, block.down, block.up, activation="relu", scale=2.0,
            residual=residual, **biases,
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda p: LoRALinear(nn.Linear(16, 16), 8, dropout_p=p),
        lambda p: AdapterLinear(nn.Linear(16, 16), 8, dropout_p=p),
        lambda p: BottleneckAdapter(16, 8, dropout_p=p),
    ],
    ids=["LoRALinear", "AdapterLinear", "BottleneckAdapter"],
)
def test_dropout_only_in_training_mode(make):
    module, x = filled(make(0.5)), torch.randn(9, 16)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
    without = filled(make(0.0))
    without.load_state_dict(module.state_dict())
    assert torch.equal(without(x), module(x))


def test_state_survives_copies_and_round_trips():
    module = filled(AdapterLinear(nn.Linear(6, 8), 3))
    clone = copy.deepcopy(module)
    x = torch.randn(4, 6)
    assert torch.equal(clone(x), module(x))
    with torch.no_grad():
        clone.up.zero_()
    assert not torch.equal(clone(x), module(x))
    other = AdapterLinear(nn.Linear(6, 8), 3)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


def test_impl_is_passed_on():
    for module in (
        LoRALinear(nn.Linear(4, 4), 2, impl="triton"),
        AdapterLinear(nn.Linear(4, 4), 2, impl="triton"),
        BottleneckAdapter(4, 2, impl="triton"),
    ):
        with pytest.raises(artemis_kernels.Unavailable, match="float64"):
            module.double()(torch.randn(3, 4, dtype=torch.float64))
        assert "impl='triton'" in repr(module)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LoRALinear(nn.Linear(4, 4), 0), ("rank", "at least 1", "0")),
        (lambda: LoRALinear(nn.Linear(4, 4), 2.0), ("rank", "integer", "2.0")),
        (lambda: LoRALinear(nn.Linear(4, 4), True), ("rank", "integer", "True")),
        (lambda: LoRALinear(nn.Linear(4, 4), 2, dropout_p=1.0), ("dropout_p", "[0, 1)", "1.0")),
        (lambda: BottleneckAdapter(4, 0), ("width", "at least 1", "0")),
        (lambda: BottleneckAdapter(4, 2, activation="tanh"), ("activation", "gelu", "'tanh'")),
        (lambda: AdapterLinear(nn.Linear(4, 4), -1), ("width", "at least 1", "-1")),
        (lambda: LoRALinear(nn.Conv1d(4, 4, 1), 2), ("base", "torch.nn.Linear", "Conv1d")),
    ],
)
def test_refusals(make, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_refusal_leaves_the_base_as_it_was():
    base = nn.Linear(4, 4)
    for make in (
        lambda: LoRALinear(base, 0),
        lambda: AdapterLinear(base, 0),
        lambda: AdapterLinear(base, 2, activation="tanh"),
    ):
        with pytest.raises(ValueError):
            make()
    assert base.weight.requires_grad and base.bias.requires_grad
