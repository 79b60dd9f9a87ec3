"""Bad input: one error that names the operation, the argument, what was given, what is allowed."""

import math
import os
import subprocess
import sys

import pytest
import torch

import artemis_kernels
from artemis_kernels import Unavailable
from tests.kit import Sizes
from tests.ops.operations import ADAPTER, BOTTLENECK, DOUBLE, LORA, OPERATIONS, SINGLE

SIZES = Sizes(3, 4, 5, 2)


def arguments(operation) -> dict:
    return operation.operands(SIZES, SINGLE)


BAD = [
    # what every operation takes
    *(
        pytest.param(operation, name, value, error, words, id=f"{operation}-{name}-{kind}")
        for operation in OPERATIONS
        for name, kind, value, error, words in (
            ("x", "list", [[1.0]], TypeError, ("floating-point tensor", "list")),
            ("x", "integers", torch.ones(3, 4, dtype=torch.int64), TypeError, ("int64",)),
            ("x", "0-d", torch.tensor(1.0), ValueError, ("at least one dimension",)),
            ("scale", "string", "1", TypeError, ("float or a 0-d tensor", "str")),
            ("scale", "bool", True, TypeError, ("float or a 0-d tensor", "bool")),
            ("scale", "vector", torch.ones(1), ValueError, ("shape ()", "(1,)")),
            ("scale", "pair", (1.0, 2.0), TypeError, ("floating-point", "float")),
            ("scale", "pair-vector", (1.0, torch.ones(1)), ValueError, ("shape ()", "(1,)")),
            ("scale", "pair-string", ("1", torch.tensor(1.0)), TypeError, ("pair", "str")),
            ("scale", "three", (1.0, 2.0, 3.0), TypeError, ("float or a 0-d tensor", "tuple")),
            ("scale", "integer", torch.tensor(1), TypeError, ("floating-point", "int64")),
            ("dropout_p", "one", 1.0, ValueError, ("[0, 1)", "1.0")),
            ("dropout_p", "negative", -0.1, ValueError, ("[0, 1)", "-0.1")),
            ("dropout_p", "nan", math.nan, ValueError, ("[0, 1)", "nan")),
            ("dropout_p", "string", "0.1", ValueError, ("[0, 1)", "'0.1'")),
            ("seed", "float", 1.5, TypeError, ("int", "int64 tensor")),
            ("seed", "bool", True, TypeError, ("int", "int64 tensor")),
            ("seed", "two", torch.ones(2, dtype=torch.int64), TypeError, ("one-element",)),
            ("seed", "int32", torch.ones(1, dtype=torch.int32), TypeError, ("int64",)),
            ("seed", "65-bits", 1 << 64, ValueError, ("64 bits", str(1 << 64))),
            ("impl", "unknown", "cuda", ValueError, ("triton", "eager", "reference", "'cuda'")),
        )
    ),
    *(
        pytest.param(operation, "activation", "tanh", ValueError, ("gelu_tanh", "relu", "'tanh'"))
        for operation in (ADAPTER, BOTTLENECK)
    ),
    # shapes: each tensor against those before it
    pytest.param(LORA, "weight", torch.ones(5, 3), ValueError, ("(any, 4)", "(5, 3)")),
    pytest.param(LORA, "weight", torch.ones(4), ValueError, ("(any, 4)", "(4,)")),
    pytest.param(LORA, "lora_a", torch.ones(2, 5), ValueError, ("(any, 4)", "(2, 5)")),
    pytest.param(LORA, "lora_b", torch.ones(5, 3), ValueError, ("(5, 2)", "(5, 3)")),
    pytest.param(LORA, "bias", torch.ones(4), ValueError, ("(5)", "(4,)")),
    pytest.param(ADAPTER, "weight", torch.ones(5, 3), ValueError, ("(any, 4)", "(5, 3)")),
    pytest.param(ADAPTER, "down", torch.ones(2, 4), ValueError, ("(any, 5)", "(2, 4)")),
    pytest.param(ADAPTER, "up", torch.ones(2, 5), ValueError, ("(5, 2)", "(2, 5)")),
    pytest.param(ADAPTER, "bias", torch.ones(2), ValueError, ("(5)", "(2,)")),
    pytest.param(ADAPTER, "bias_down", torch.ones(5), ValueError, ("(2)", "(5,)")),
    pytest.param(ADAPTER, "bias_up", torch.ones(2), ValueError, ("(5)", "(2,)")),
    pytest.param(BOTTLENECK, "down", torch.ones(2, 5), ValueError, ("(any, 4)", "(2, 5)")),
    pytest.param(BOTTLENECK, "up", torch.ones(2, 4), ValueError, ("(4, 2)", "(2, 4)")),
    pytest.param(BOTTLENECK, "bias_down", torch.ones(4), ValueError, ("(2)", "(4,)")),
    pytest.param(BOTTLENECK, "bias_up", torch.ones(2), ValueError, ("(4)", "(2,)")),
    pytest.param(BOTTLENECK, "residual", torch.ones(4), ValueError, ("(3, 4)", "(4,)")),
    # a large operand is never cast at every call; one elsewhere is never moved
    pytest.param(LORA, "weight", torch.ones(5, 4).half(), TypeError, ("float16", "float32")),
    pytest.param(ADAPTER, "weight", torch.ones(5, 4).double(), TypeError, ("float64", "float32")),
    pytest.param(BOTTLENECK, "residual", torch.ones(3, 4).half(), TypeError, ("float16",)),
    pytest.param(LORA, "weight", torch.ones(5, 4, device="meta"), ValueError, ("meta", "cpu")),
    pytest.param(ADAPTER, "down", torch.ones(2, 5, device="meta"), ValueError, ("meta", "cpu")),
    pytest.param(BOTTLENECK, "up", torch.ones(4, 2, device="meta"), ValueError, ("meta", "cpu")),
]


@pytest.mark.parametrize(("operation", "name", "value", "error", "words"), BAD)
def test_refusal_names_the_argument(operation, name, value, error, words):
    for call in (operation.public, lambda **a: artemis_kernels.explain(operation.name, **a)):
        with pytest.raises(error) as caught:
            call(**arguments(operation) | {name: value})
        message = str(caught.value)
        assert message.startswith(f"{operation.name}: ") and "\n" not in message
        for word in (name, *words):
            assert word in message, message


def test_explain_of_an_unknown_operation():
    with pytest.raises(ValueError, match="adapter_linear.*bottleneck_adapter.*lora_linear.*'dora'"):
        artemis_kernels.explain("dora")


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_triton_has_no_fp64(operation):
    tensors = operation.operands(SIZES, DOUBLE)
    with pytest.raises(Unavailable, match="impl='triton' cannot run: x is torch.float64"):
        operation.public(**tensors, impl="triton")
    assert operation.public(**tensors).dtype == DOUBLE  # the best that applies


OUTSIDE = """
import torch, artemis_kernels
x, a = torch.ones(3, 4), torch.ones(2, 4)
assert artemis_kernels.explain("bottleneck_adapter", x, a, a.T).impl == "eager"
try:
    artemis_kernels.bottleneck_adapter(x, a, a.T, impl="triton")
except artemis_kernels.Unavailable as refusal:
    print(refusal)
"""


def test_triton_on_the_cpu_needs_the_interpreter():
    """In a process of its own: this one may have the interpreter's flag set."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", OUTSIDE], env=environment, capture_output=True, text=True, check=True
    )
    assert "impl='triton' cannot run: the tensors are on 'cpu'" in result.stdout


@pytest.mark.parametrize("operation", [LORA, ADAPTER], ids=str)
def test_weight_that_requires_a_gradient(operation):
    """Served by the reference, which gives the gradient; refused by a path that would not."""
    tensors = operation.operands(SIZES, SINGLE)
    tensors["weight"].requires_grad_()
    choice = artemis_kernels.explain(operation.name, **tensors)
    assert choice.impl == "reference" and "weight requires a gradient" in choice.reason
    operation.public(**tensors).sum().backward()
    assert tensors["weight"].grad.abs().sum() > 0
    for impl in ("eager", "triton"):
        with pytest.raises(Unavailable, match="takes a frozen weight"):
            operation.public(**tensors, impl=impl)
    with torch.no_grad():
        assert artemis_kernels.explain(operation.name, **tensors).impl != "reference"
        operation.public(**tensors, impl="eager")
