"""Packed experts compute what transformers' own code computes over dequantized ones in fp64."""

import copy

import pytest
import torch
from torch import nn

from artemis.layers.expert_weights import ExpertWeights
from artemis.layers.packed_experts import QuantizedExperts
from artemis.layers.routing import Routing
from artemis_kernels import explain, quantized_linear
from tests.artemis import moe
from tests.artemis.experts import packed, routed, run
from tests.artemis.quantization.kit import relative

#: Forms of experts: plain, transposed with biases and a gate of its own, without a gate, ...
FORMS = {name: lambda f=build: experts_of(f()) for name, build in moe.MODELS.items()}
FORMS["without_gate"] = moe.without_gate


def experts_of(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if hasattr(m, "is_transposed"))


def assert_same_meaning(module: nn.Module, truth: nn.Module, inputs, limit: float) -> None:
    got, wanted = run(module, *inputs), run(truth, *inputs, dtype=torch.float64)
    for name, one, other in zip(("output", "hidden", "weights"), got, wanted, strict=True):
        assert one.dtype == torch.float32 and one.shape == other.shape
        assert relative(one, other) < limit, name


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("form", FORMS)
def test_output_and_gradients(form, format):
    torch.manual_seed(0)
    plain = FORMS[form]()
    module = packed(copy.deepcopy(plain), format)
    assert isinstance(module, type(plain)) and isinstance(module, QuantizedExperts)
    assert not any(name.endswith("_proj") for name, _ in module.named_parameters())
    assert_same_meaning(module, moe.fp64(module, plain), routed(19), 1e-5)


def test_each_experts_output_is_normed_where_the_model_says_so():
    torch.manual_seed(0)
    plain = experts_of(moe.mixtral())
    module = packed(copy.deepcopy(plain))
    module.has_post_expert_norm, module.post_expert_norm = True, nn.LayerNorm(32)
    hidden, chosen, weights = routed(1)
    truth, wanted = moe.fp64(module.to(torch.float32), plain), 0.0
    for place in range(2):
        one = truth(hidden.double(), chosen[:, place : place + 1], torch.ones(1, 1).double())
        wanted = wanted + weights[0, place] * nn.functional.layer_norm(one, (32,))
    assert relative(module(hidden, chosen, weights), wanted) < 1e-5


ROUTES = {
    "one token": (1, [[2, 0]]),
    "an expert without any": (5, [[0, 1], [1, 3], [3, 0], [0, 3], [1, 0]]),
    "all to one": (6, [[3]] * 6),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("form", ["mixtral", "gpt_oss"])
def test_few_tokens_and_idle_experts(form, route):
    torch.manual_seed(0)
    plain, (rows, chosen) = FORMS[form](), ROUTES[route]
    module, chosen = packed(copy.deepcopy(plain)), torch.tensor(chosen)
    inputs = torch.randn(rows, 32), chosen, torch.rand(chosen.shape)
    assert_same_meaning(module, moe.fp64(module, plain), inputs, 1e-5)


def test_no_token_at_all():
    module = packed(experts_of(moe.gpt_oss()))
    output, hidden, weights = run(module, *(t[:0] for t in routed(1)))
    assert output.shape == hidden.shape == (0, 32) and weights.shape == (0, 2)


def test_a_choice_of_no_expert_adds_nothing():
    """Models number it one past the experts."""
    torch.manual_seed(0)
    module = packed(experts_of(moe.gpt_oss()))
    hidden, chosen, weights = routed(7)
    nobodys = torch.rand(7, 2) < 0.5
    nobodys[0] = True
    got = run(module, hidden, chosen.where(~nobodys, 4), weights)
    wanted = run(module, hidden, chosen, weights * ~nobodys)
    for one, other in zip(got[:2], wanted[:2], strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(got[2], wanted[2] * ~nobodys)
    assert not got[0][0].any()


def test_eight_bits_of_both_sides():
    """x and dY rounded as well: near the truth, and not what weights alone give."""
    torch.manual_seed(0)
    plain = experts_of(moe.mixtral(hidden_size=64, intermediate_size=96))
    module, inputs = packed(copy.deepcopy(plain), bits=8), routed(96, 64)
    alone = packed(copy.deepcopy(plain), bits=16)
    assert_same_meaning(module, moe.fp64(module, plain), inputs, 0.03)
    assert relative(run(module, *inputs)[0], run(alone, *inputs)[0]) > 1e-3


def test_how_an_expert_multiplies_is_explained():
    x = torch.randn(64, 32)
    for bits, named in ((16, "weight_only"), (8, "int8")):
        experts = packed(experts_of(moe.gpt_oss()), bits=bits)
        choice = explain(quantized_linear, x, experts.gate_up_proj[3])
        assert choice.op == "quantized_linear" and named in choice.strategy


def test_the_dtypes_of_a_model_in_bf16_and_under_autocast():
    torch.manual_seed(0)
    module, (hidden, chosen, weights) = packed(experts_of(moe.gpt_oss())), routed(9)
    wanted = module(hidden, chosen, weights)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(hidden, chosen, weights)
    assert got.dtype == torch.float32 and 1e-5 < relative(got, wanted) < 0.03
    got = module.to(torch.bfloat16)(hidden.bfloat16(), chosen, weights)  # the router's in fp32
    assert got.dtype == torch.bfloat16 and relative(got, wanted) < 0.03


def test_rows_go_to_their_experts_and_come_back():
    chosen = torch.tensor([[2, 0], [0, 1], [3, 2]])
    routing = Routing.of(chosen, 3)
    hidden = torch.tensor([[0.0], [10.0], [20.0]])
    assert routing.rows(hidden).flatten().tolist() == [0, 10, 10, 0, 20, 20]
    assert routing.counts == [2, 1, 2, 1]
    rows = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
    weights = torch.tensor([[1.0, 10.0], [1.0, 10.0], [1.0, 10.0]])
    assert routing.sums(rows, weights).flatten().tolist() == [4 + 10, 2 + 30, 6 + 50]


def test_gradients_of_gradients():
    torch.manual_seed(0)
    routing = Routing.of(torch.tensor([[1, 0], [2, 1], [0, 2]]), 3)
    hidden = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)

    def there_and_back(hidden, weights):
        return routing.sums(routing.rows(hidden).square(), weights)

    assert torch.autograd.gradcheck(there_and_back, (hidden, weights))
    assert torch.autograd.gradgradcheck(there_and_back, (hidden, weights))


def test_compiled_models_leave_their_graph_for_it():
    torch.manual_seed(0)
    torch.compiler.reset()
    experts = packed(experts_of(moe.mixtral()))
    graphs = []

    def counted(graph, _):
        graphs.append(graph)
        return graph.forward

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts, self.before = experts, nn.Linear(32, 32)

        def forward(self, hidden, chosen, weights):
            return self.experts(self.before(hidden), chosen, weights) * 2

    model = Around()
    compiled = torch.compile(model, backend=counted, dynamic=True)
    for rows in (4, 9, 17):
        inputs = routed(rows)
        torch.testing.assert_close(compiled(*inputs), model(*inputs))
    assert 0 < len(graphs) <= 4  # before and after, not one for each way that tokens spread
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend=counted, fullgraph=True)(*inputs)


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_a_stack_is_its_experts_weights(format):
    torch.manual_seed(0)
    stack = torch.randn(3, 10, 64).mT.contiguous().mT
    weights = ExpertWeights.quantize(stack, format)
    assert weights.shape == stack.shape and len(list(weights)) == 3
    assert weights.nbytes == sum(weight.nbytes for weight in weights)
    for weight, matrix in zip(weights, stack, strict=True):
        alone = type(weight).quantize(matrix, format)
        assert torch.equal(weight.dequantize(), alone.dequantize())
    with pytest.raises(ValueError, match="another number of experts"):
        ExpertWeights(
            weights.data, weights.scale[:2], weights.offset, format, weights.group_size, 16
        )
