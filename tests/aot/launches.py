"""Every operation once, launched through Triton's own CUDA driver over `libcuda.c`: `test_driver`.

Tensors lie on the CPU, which stands for a Hopper chip; their numbers mean nothing.
"""

import torch
import triton
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

import artemis_kernels
from artemis.benchmark.operations import OPERATIONS, SEED, Sizes, operands, outcome
from artemis_kernels import FrozenAdapter, QuantizedWeight
from artemis_kernels.core import call, device, tuning
from artemis_kernels.core.tiling import Shape
from artemis_kernels.ops.low_rank.expand import expand
from artemis_kernels.ops.low_rank.expand_persistent import expand_persistent

SIZES = Sizes(256, 64, 128, 16)
CPU, BF16 = torch.device("cpu"), torch.bfloat16
TRITON = {"impl": "triton"}


class Driver(CudaDriver):
    """Triton's own, but that it does not ask torch which GPU and stream there are."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_device_capability = staticmethod(lambda device: (9, 0))


def trained(operation) -> None:
    """Forward and all gradients, with dropout."""
    tensors = operands(operation, SIZES, BF16, CPU)
    dy = torch.randn_like(operation.public(tensors, impl="reference"))
    outcome(
        lambda t: operation.public(t, dropout_p=0.1, seed=SEED, **TRITON),
        tensors, operation.trained, dy,
    )  # fmt: skip


def packed() -> None:
    """A weight multiplied in 8 bits and one that is unpacked; a layer at inference."""
    weight, few = torch.randn(SIZES.n, SIZES.k), torch.randn(8, SIZES.k).to(BF16)
    x = torch.randn(SIZES.m, SIZES.k).to(BF16).requires_grad_()
    rounded = QuantizedWeight.quantize(weight, "int8", activation_bits=8)
    artemis_kernels.quantized_linear(x, rounded, **TRITON).sum().backward()
    adapter = FrozenAdapter.lora(
        torch.randn(SIZES.r, SIZES.k).to(BF16), torch.randn(SIZES.n, SIZES.r).to(BF16)
    )
    only_weight = QuantizedWeight.quantize(weight, "int8", activation_bits=16)
    for held in (only_weight, weight.to(BF16)):
        artemis_kernels.frozen_linear(few, held, adapter, **TRITON)
        artemis_kernels.frozen_linear(few[:1], held, adapter, **TRITON)


def product() -> None:
    """A product whose operands come by tensor maps, each encoded by the driver, and by pointers."""
    (m, k, n, r), chip = SIZES, device.CHIPS["sm_90"]
    x, weight = torch.randn(m, k).to(BF16), torch.randn(n, k).to(BF16)
    config = tuning.config("expand", Shape(m, n, k, r, BF16), chip)
    s, b = torch.randn(m, r), torch.randn(n, r)
    expand_persistent(x, weight, s, b, config=config, programs=chip.processors)
    expand(x, weight, s, b, config=config)


def loss() -> None:
    logits = torch.randn(8, 100, dtype=BF16, requires_grad=True)
    artemis_kernels.cross_entropy(logits, torch.arange(8), **TRITON).backward()


def between_products() -> None:
    x, weight = torch.randn(8, 100, dtype=BF16, requires_grad=True), torch.ones(100, dtype=BF16)
    artemis_kernels.rms_norm(x, weight.requires_grad_(), **TRITON).sum().backward()
    artemis_kernels.gated_activation(x, x, **TRITON).sum().backward()
    q = torch.randn(2, 4, 8, 64, dtype=BF16, requires_grad=True)
    table = torch.randn(1, 8, 64, dtype=BF16)
    q, k = artemis_kernels.rotary_embedding(q, q[:, :1], table, table, **TRITON)
    (q.sum() + k.sum()).backward()


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    device.CHIPS[device.INTERPRETER] = device.CHIPS["sm_90"]
    call.why_no_triton = lambda where: None
    for operation in OPERATIONS:
        trained(operation)
    packed()
    product()
    loss()
    between_products()


if __name__ == "__main__":
    main()
