"""The operators inside torch's machinery: opcheck, whole-graph compilation, dynamic shapes."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.utils.checkpoint import checkpoint

import artemis_kernels
import artemis_kernels.nn
from tests import kit
from tests.kit import Sizes
from tests.ops.operations import ADAPTER, BOTTLENECK, LORA, OPERATIONS, SINGLE, every_path

SMALL = Sizes(6, 5, 4, 3)
# aot_eager traces, functionalises and partitions like Inductor, and needs no C++ compiler.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def schema_arguments(operation, path, tensors, *, dropout_p=0.25) -> tuple:
    """The torch operator's arguments, in its order."""
    t = dict(tensors)
    scale = t.pop("scale")
    seed = torch.tensor([3]) if dropout_p else None
    tail = (dropout_p, seed, path.impl, path.strategy)
    if operation is LORA:
        names = ("x", "weight", "lora_a", "lora_b", "bias")
        return (*(t.get(name) for name in names), 1.0, scale, *tail)
    if operation is ADAPTER:
        names = ("x", "weight", "down", "up", "bias", "bias_down", "bias_up")
    else:
        names = ("x", "down", "up", "bias_down", "bias_up", "residual")
    return (*(t.get(name) for name in names), 1.0, scale, "gelu", *tail)


@pytest.mark.parametrize(("operation", "path"), every_path(SINGLE))
def test_opcheck(operation, path):
    """Schema, fake tensors, autograd registration, AOT dispatch with dynamic shapes."""
    tensors = operation.operands(SMALL, SINGLE)
    for name in operation.trained:
        tensors[name].requires_grad_()
    dropout_p = 0.0 if path.strategy == "one_pass" else 0.25
    arguments = schema_arguments(operation, path, tensors, dropout_p=dropout_p)
    torch.library.opcheck(getattr(torch.ops.artemis, operation.name).default, arguments)


@pytest.mark.parametrize(("operation", "path"), every_path(SINGLE))
def test_opcheck_of_forward_and_backward(operation, path):
    """The two operators below autograd: no gradients of their own, so schema and fakes."""
    tensors = operation.operands(SMALL, SINGLE, without=("residual",))
    dropout_p = 0.0 if path.strategy == "one_pass" else 0.25
    arguments = schema_arguments(operation, path, tensors, dropout_p=dropout_p)
    forward = getattr(torch.ops.artemis, f"{operation.name}_forward").default
    backward = getattr(torch.ops.artemis, f"{operation.name}_backward").default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, arguments, test_utils=checks)
    y, *saved = forward(*arguments)
    operands = {LORA: 4, ADAPTER: 7, BOTTLENECK: 5}[operation]
    head, tail = arguments[:operands], arguments[5 + (operation is ADAPTER) * 2 :]
    if operation is BOTTLENECK:
        tail = (*arguments[6:], True)
    needs = [True] * len([name for name in operation.trained if name != "residual"])
    torch.library.opcheck(
        backward, (torch.randn_like(y), *head, *saved, *tail, needs), test_utils=checks
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("impl", ["eager", "reference", "triton"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_whole_graph_forward_and_backward(operation, impl, dropout_p):
    tensors = operation.operands(SMALL, SINGLE)

    def run(**arguments):
        seed = torch.tensor([9]) if dropout_p else None
        return operation.public(**arguments, dropout_p=dropout_p, seed=seed, impl=impl) * 2

    compiled = torch.compile(run, fullgraph=True, backend=BACKEND)
    wanted = kit.outcome(run, tensors, operation.trained)
    kit.assert_same_outcome(kit.outcome(compiled, tensors, operation.trained), wanted)


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_one_graph_serves_every_number_of_rows(operation):
    counter = CompileCounterWithBackend(BACKEND)

    def run(**arguments):
        return operation.public(**arguments, dropout_p=0.25, seed=torch.tensor([9]))

    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=True)
    for rows in (7, 12, 40):
        tensors = operation.operands(SMALL._replace(m=rows), SINGLE)
        wanted = kit.outcome(run, tensors, operation.trained)
        kit.assert_same_outcome(kit.outcome(compiled, tensors, operation.trained), wanted)
    assert counter.frame_count == 1


def test_one_graph_serves_every_tensor_scale():
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(artemis_kernels.lora_linear, fullgraph=True, backend=counter)
    tensors = LORA.operands(SMALL, SINGLE)
    for scale in (0.25, 0.5, 1.5):
        tensors["scale"] = torch.tensor(scale)
        wanted = artemis_kernels.lora_linear(**tensors | {"scale": scale})
        torch.testing.assert_close(compiled(**tensors), wanted)
    assert counter.frame_count == 1


class Quantized(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = artemis_kernels.QuantizedWeight.quantize(torch.randn(64, 16))

    def forward(self, x):
        return artemis_kernels.quantized_linear(x, self.weight)


def folding_by_rows() -> torch.nn.Module:
    """A bottleneck that is cheaper folded from 22 rows on."""
    module = artemis_kernels.nn.AdapterLinear(torch.nn.Linear(16, 64), 4)
    torch.nn.init.normal_(module.up)
    return module.eval()


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("make", [folding_by_rows, Quantized])
def test_an_exported_program_takes_any_number_of_rows(make, strict):
    """Though a call would choose another strategy for few."""
    module = make()
    with torch.no_grad():
        program = export(
            module, (torch.randn(1, 64, 16),), dynamic_shapes=({1: Dim.DYNAMIC},), strict=strict
        )
        for rows in (3, 500):
            x = torch.randn(1, rows, 16)
            y, wanted = program.module()(x), module(x)
            assert (y - wanted).norm() < 0.02 * wanted.norm()  # few rows are not rounded to int8


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_drawn_seed_is_fresh_at_every_compiled_call(operation):
    tensors = operation.operands(SMALL, SINGLE)
    compiled = torch.compile(
        lambda **arguments: operation.public(**arguments, dropout_p=0.5),
        fullgraph=True,
        backend=BACKEND,
    )
    assert not torch.equal(compiled(**tensors), compiled(**tensors))
    torch.manual_seed(4)
    first = compiled(**tensors)
    torch.manual_seed(4)
    kit.assert_same_bits(compiled(**tensors), first)


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_checkpointing_inside_a_compiled_function(operation):
    tensors = operation.operands(SMALL, SINGLE)

    def run(x, **arguments):
        return operation.public(x, **arguments, dropout_p=0.5)

    def checkpointed(**arguments):
        return checkpoint(run, use_reentrant=False, **arguments)

    results = []
    for function in (run, checkpointed):
        compiled = torch.compile(function, fullgraph=True, backend=BACKEND)
        torch.manual_seed(6)
        results.append(kit.outcome(compiled, tensors, operation.trained))
    kit.assert_same_outcome(results[1], results[0])


def test_autocast_inside_a_compiled_function():
    tensors = LORA.operands(SMALL, SINGLE)

    def run(**arguments):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return artemis_kernels.lora_linear(**arguments)

    compiled = torch.compile(run, fullgraph=True, backend=BACKEND)
    wanted = kit.outcome(run, tensors, LORA.trained)
    assert wanted["y"].dtype == torch.bfloat16
    kit.assert_same_outcome(kit.outcome(compiled, tensors, LORA.trained), wanted)


def test_modules_compile_whole():
    module = artemis_kernels.nn.LoRALinear(torch.nn.Linear(6, 4), 2, dropout_p=0.5)
    torch.nn.init.normal_(module.lora_b)
    compiled = torch.compile(module, fullgraph=True, backend=BACKEND)
    x, results = torch.randn(5, 6), []
    for function in (module, compiled):
        torch.manual_seed(1)
        module.zero_grad()
        y = function(x)
        y.sum().backward()
        results.append({"y": y.detach(), "a": module.lora_a.grad, "b": module.lora_b.grad})
    # The compiled sum hands over a gradient of another layout, so BLAS may sum in another order.
    torch.testing.assert_close(results[1], results[0])
