"""The compiled kernels on a GPU: what the interpreter cannot show, bf16 first."""

from functools import partial

import pytest
import torch

import artemis_kernels
from tests import kit
from tests.kit import Sizes, logits_gradient
from tests.ops import gated_activation, rms_norm, rotary_embedding
from tests.ops.operations import BF16, HALF, OPERATIONS, SINGLE, Path, follow_reference

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")

STRATEGIES = [
    pytest.param(operation, strategy, id=f"{operation.name}-{strategy}")
    for operation in OPERATIONS
    for strategy in operation.triton
]


def operands_on(device, operation, sizes: Sizes, dtype: torch.dtype) -> kit.Tensors:
    return {name: t.to(device) for name, t in operation.operands(sizes, dtype).items()}


@pytest.mark.parametrize("dtype", [BF16, HALF, SINGLE], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(Sizes(300, 256, 384, 16), id="aligned"),
        pytest.param(Sizes(129, 131, 77, 5), id="odd"),  # no vector loads, masks everywhere
        pytest.param(Sizes(1, 512, 256, 8), id="one-row"),
    ],
)
@pytest.mark.parametrize(("operation", "strategy"), STRATEGIES)
def test_follows_the_reference(operation, strategy, sizes, dtype):
    path = Path("triton", strategy, dtype)
    tensors = operands_on(GPU, operation, sizes, dtype)
    follow_reference(operation, path, tensors)
    if strategy != "one_pass":
        follow_reference(operation, path, tensors, dropout_p=0.3, seed=7)


@pytest.mark.parametrize("dtype", [BF16, HALF, SINGLE], ids=str)
@pytest.mark.parametrize("shape", [(7, 1), (65, 4097), (300, 50257)], ids=str)
def test_cross_entropy(shape, dtype):
    logits = (3 * torch.randn(shape, device=GPU)).to(dtype)
    target = torch.randint(shape[1], shape[:1], device=GPU)
    target[::3] = -100
    got, wanted = (x.requires_grad_() for x in (logits.clone(), logits.double()))
    loss = artemis_kernels.cross_entropy(got, target, impl="triton")
    truth = torch.nn.functional.cross_entropy(wanted, target)
    loss.backward()
    truth.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=4e-6, atol=4e-6)
    allowed = torch.finfo(dtype).eps / 2 * wanted.grad.abs() + 4e-6 / shape[0] + 2.0**-24
    assert ((got.grad.double() - wanted.grad).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [BF16, HALF, SINGLE], ids=str)
@pytest.mark.parametrize(
    "shape", [(7, 1), (300, 128), (65, 4097), (600, 4096), (3, 20000)], ids=str
)
def test_rms_norm(shape, dtype):
    given = on_gpu(rms_norm.operands(*shape, dtype))
    run = partial(artemis_kernels.rms_norm, impl="triton")
    rms_norm.assert_right(rms_norm.gradients(run, *given), *given)


@pytest.mark.parametrize("dtype", [BF16, HALF, SINGLE], ids=str)
@pytest.mark.parametrize("activation", kit.ACTIVATIONS)
def test_gated_activation(activation, dtype):
    given = on_gpu(gated_activation.operands(33, 1025, dtype=dtype))
    run = partial(artemis_kernels.gated_activation, impl="triton")
    gated_activation.assert_right(
        gated_activation.gradients(run, *given, activation), *given, activation
    )


@pytest.mark.parametrize("dtype", [BF16, HALF, SINGLE], ids=str)
@pytest.mark.parametrize("shape", [(2, 33, 8, 17, 128), (1, 3, 1, 5, 80), (2, 1, 1, 1, 2)], ids=str)
def test_rotary_embedding(shape, dtype):
    given = on_gpu(rotary_embedding.operands(*shape, dtype))
    run = partial(artemis_kernels.rotary_embedding, impl="triton")
    rotary_embedding.assert_right(rotary_embedding.gradients(run, *given), *given)


def on_gpu(tensors) -> list[torch.Tensor]:
    return [tensor.to(GPU) for tensor in tensors]


@pytest.mark.parametrize("dtype", [BF16, HALF, SINGLE], ids=str)
def test_dx_of_a_head(dtype):
    """Small numbers that only count together; and a row whose fixed-point sums pass 32 bits."""
    head = torch.randn(4000, 64) + torch.randn(64)
    weight = artemis_kernels.QuantizedWeight.quantize(head, makes_logits=True).to(GPU)
    x = torch.randn(512, 64, device=GPU, dtype=dtype, requires_grad=True)
    dy = 512 * logits_gradient(512, 4000, 3.0).to(GPU, dtype)
    dy[0] = 1
    assert artemis_kernels.explain("quantized_linear", x, weight).strategy.endswith("int8_logits")
    (dx,) = torch.autograd.grad(artemis_kernels.quantized_linear(x, weight), x, dy)
    truth = dy.double() @ weight.dequantize(torch.float64)
    pairs = ((dx, truth), (dx[0], truth[0]), (dx[1:].sum(0), truth[1:].sum(0)))
    assert all((got - wanted).norm() < 0.03 * wanted.norm() for got, wanted in pairs)


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_same_bits_every_time(operation):
    tensors = operands_on(GPU, operation, Sizes(300, 256, 384, 16), BF16)
    first, second = (
        kit.outcome(operation.public, tensors, operation.trained, dropout_p=0.3, seed=7)
        for _ in range(2)
    )
    kit.assert_same_outcome(second, first)


@pytest.mark.parametrize("seed", [0, 7, -1, 2**62 + 1])
def test_the_mask_is_the_cpus(seed):
    on_gpu = artemis_kernels.dropout_mask((65, 33), 0.4, seed, GPU)
    assert torch.equal(on_gpu.cpu(), artemis_kernels.dropout_mask((65, 33), 0.4, seed, "cpu"))
    eye = torch.eye(34, device=GPU)
    x = torch.ones(65, 34, device=GPU)
    y = artemis_kernels.lora_linear(
        x, torch.zeros_like(eye), eye, eye, 1.0, dropout_p=0.4, seed=seed, impl="triton"
    )
    assert torch.equal((y != 0).cpu(), artemis_kernels.dropout_mask((65, 34), 0.4, seed, "cpu"))


def drawn_step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y and dX of identities, which differ from zero where a mask of their own keeps x."""
    eye = torch.eye(x.shape[1], device=x.device)
    zeros = torch.zeros_like(eye)
    y = artemis_kernels.lora_linear(x, zeros, eye, eye, 1.0, dropout_p=0.5, impl="triton")
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), dx


def test_a_cuda_graph_draws_a_fresh_mask_at_each_replay():
    """The seed is drawn on the device, and the backward of a replay takes the same one."""
    x = torch.ones(65, 34, device=GPU, requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            drawn_step(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph, masks = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        y, dx = drawn_step(x)
    for _ in range(2):
        graph.replay()
        masks.append((y != 0).cpu())
        assert torch.equal(masks[-1], (dx != 0).cpu())
        assert 0.4 < masks[-1].double().mean() < 0.6
    assert not torch.equal(*masks)


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_one_graph_under_torch_compile(operation):
    tensors = operands_on(GPU, operation, Sizes(300, 256, 384, 16), BF16)
    torch._dynamo.reset()
    compiled = torch.compile(operation.public, fullgraph=True, backend="aot_eager")
    plain, whole = (
        kit.outcome(run, tensors, operation.trained, dropout_p=0.3, seed=7)
        for run in (operation.public, compiled)
    )
    torch._dynamo.reset()
    kit.assert_same_outcome(whole, plain)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("operation", "strategy"), STRATEGIES)
def test_a_second_gpu_while_the_first_is_current(operation, strategy):
    """Triton launches on the current device: each operator makes its operands' the current one."""
    tensors = operands_on(torch.device("cuda", 1), operation, Sizes(300, 256, 384, 16), BF16)
    with torch.cuda.device(0):
        follow_reference(operation, Path("triton", strategy, BF16), tensors)
        assert torch.cuda.current_device() == 0
