"""Cases of what stands between a transformer's products, at the shapes of Llama 2 7B."""

from artemis_kernels.ops.gated_activation import kernels as gated
from artemis_kernels.ops.rms_norm import kernels as norm
from artemis_kernels.ops.rotary_embedding import kernels as rotary
from tests.aot.case import BF16, FP32, Case, meta

_ROWS, _EPS = 8192, 1e-5


def _norm(n, dtype):
    return lambda chip: norm.forward(meta(_ROWS, n, dtype=dtype), meta(n, dtype=dtype), _EPS)


def _norm_gradient(n, dtype, needs_weight=False):
    def launch(chip):
        x, weight = meta(_ROWS, n, dtype=dtype), meta(n, dtype=dtype)
        norm.backward(x, x, weight, _EPS, needs_weight)

    return launch


def _gated(activation, dtype):
    x = meta(_ROWS, 11008, dtype=dtype)
    return lambda chip: gated.forward(x, x, activation)


def _gated_gradient(activation, dtype):
    x = meta(_ROWS, 11008, dtype=dtype)
    return lambda chip: gated.backward(x, x, x, activation)


def _rotary(way, head, dtype):
    def launch(chip):
        q, k = (meta(2, 4096, heads, head, dtype=dtype).transpose(1, 2) for heads in (32, 8))
        table = meta(1, 4096, head, dtype=dtype)
        way(q, k, table, table)

    return launch


CASES = (
    Case("rms_norm", _norm(4096, BF16)),
    Case("rms_norm fp32", _norm(4096, FP32), fp32=True),
    Case("rms_norm of heads", _norm(128, BF16)),
    Case("rms_norm, the longest held", _norm(norm.HELD_FORWARD, FP32), fp32=True),
    Case("rms_norm, longer", _norm(2 * norm.HELD_FORWARD, BF16)),
    Case("rms_norm gradient", _norm_gradient(4096, BF16)),
    Case("rms_norm gradient of heads", _norm_gradient(128, BF16, True)),
    Case("rms_norm gradients", _norm_gradient(4096, BF16, True)),
    Case("rms_norm gradients fp32", _norm_gradient(4096, FP32, True), fp32=True),
    Case("rms_norm gradients, the longest held", _norm_gradient(norm.HELD_BACKWARD, FP32, True)),
    Case("rms_norm gradients, longer", _norm_gradient(2 * norm.HELD_BACKWARD, BF16, True)),
    Case("gated_activation", _gated("silu", BF16)),
    Case("gated_activation fp32", _gated("silu", FP32), fp32=True),
    Case("gated_activation gradient", _gated_gradient("silu", BF16)),
    Case("gated_activation gradient fp32", _gated_gradient("silu", FP32), fp32=True),
    Case("gated_activation gradient gelu", _gated_gradient("gelu", BF16)),
    Case("rotary_embedding", _rotary(rotary.forward, 128, BF16)),
    Case("rotary_embedding fp32", _rotary(rotary.forward, 128, FP32), fp32=True),
    Case("rotary_embedding of 80", _rotary(rotary.forward, 80, BF16)),
    Case("rotary_embedding gradient", _rotary(rotary.backward, 128, BF16)),
)
