"""Passes over little: they start no threads, of which a forked process has none."""

import os
import subprocess
import sys

import pytest

from artemis_kernels.core import native

FORKED = """
import os, signal, torch
from artemis_kernels import FrozenAdapter, FrozenLinear, QuantizedWeight
from artemis_kernels.core import adapter_passes, bf16_products, dropped, eight_bit, thin_products
from artemis_kernels.core.units import Units
from artemis_kernels.ops.attention import eager as attention
from artemis_kernels.ops.cross_entropy import eager as cross_entropy
from artemis_kernels.ops.gated_activation import eager as gated
from artemis_kernels.ops.rms_norm import eager as rms_norm
from artemis_kernels.ops.rotary_embedding import eager as rotary

torch.set_num_threads(2)
dropout = dropped.Dropout(0.1, torch.tensor([3]))

def passes(m, k, n):
    x, w, ds = torch.randn(m, k), torch.randn(n, k), torch.randn(m, 8)
    held = {format: QuantizedWeight.quantize(w, format) for format in ("int8", "fp8", "int4")}
    narrow, few, turned = x.bfloat16(), x[:2].bfloat16(), w.bfloat16().t().contiguous()
    layers = [FrozenLinear(weight, FrozenAdapter.none(weight, dtype=few.dtype))
              for weight in held.values()]
    targets = torch.zeros(m, dtype=torch.int64)
    z, y = (torch.randn(max(m, 16), width).bfloat16() for width in (k, n))
    q = torch.randn(2, 1, max(m // 4, 8), 16).bfloat16()
    units = Units("gelu", None, dropout)

    def call():
        dropped.dropped(x, dropout)
        dropped.project_dropped(x, w[:8], dropout)
        dropped.project_dropped(narrow, w[:8], dropout)
        dropped.outer_dropped(ds, x, dropout)
        dropped.add_dropped_product_(x, ds, w[:8], dropout)
        for dtype in (x.dtype, narrow.dtype):
            logits = x.to(dtype)
            _, kept = cross_entropy.forward(logits, targets, -100)
            cross_entropy.backward(x[:, 0], logits, targets, kept, -100)
            heads = logits[None, None]
            rms_norm.backward(rms_norm.forward(logits, w[0], 1e-6), logits, w[0], 1e-6, True)
            gated.backward(gated.forward(logits, logits, "silu"), logits, logits, "silu")
            rotary.backward(*rotary.forward(heads, heads, x[None], x[None]), x[None], x[None])
            eight_bit.linear(x.to(dtype), held["int8"].data, held["int8"].scale, None)
        bf16_products.multiply(y, y[:8].contiguous())
        _, kept = attention.forward(q, q, q, None, 1.0, True)
        attention.backward(q, q, q, q, None, kept, 1.0, True)
        thin_products.multiply(few, turned)
        thin_products.multiply(narrow, turned[:, :4])
        adapter_passes.bottleneck_forward(y, z[:, :8], w[:, :8], None, units, 1.0)
        adapter_passes.bottleneck_backward(y, z[:, :8], w[:, :8], None, units, 1.0, True)
        adapter_passes.low_rank_backward(y, z[:, :8], w[:, :8], 1.0, 1.0, True, True, True)
        for layer in layers:
            layer(few)

    return call

large, small = passes(512, 256, 128), passes(4, 32, 24)
large()
child = os.fork()
if not child:
    signal.alarm(20)
    small()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "a pass of the forked process did not come back"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.skipif(native.library().handle is None, reason=str(native.library().reason))
def test_small_passes_of_a_forked_process():
    """As a DataLoader's workers are, whose parent has threads."""
    subprocess.run([sys.executable, "-c", FORKED], check=True)
