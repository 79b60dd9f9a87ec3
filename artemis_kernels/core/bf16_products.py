"""Products of bf16 rows with a frozen weight, by `native/bf16_product.c`: one call, one rounding.

    y = x Wᵀ + bias + plus        dX = dY W + plus

BLAS forms them about as fast where there are many rows, but a low-rank term and what dX is added to
take passes of their own then; here fp32 sums stay in registers until all is added. With fewer rows
BLAS waits for the weight to come from memory, which is fetched ahead here.
"""

import torch

from . import native
from .expanded import Expanded, fitting
from .native import address
from .products import LowRank

FEWEST_ROWS = 8  # a tile's


def available() -> bool:
    """Whether this processor and compiler have the pass."""
    return native.over_bf16("bf16_product") is not None


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    into: torch.Tensor | None = None,
    plus: LowRank | None = None,
) -> torch.Tensor | None:
    """`x weightᵀ + bias + plus` for x [M, K] and weight [N, K]; None where the pass does not serve.

    It takes bf16, and a weight whose rows or columns lie one after the other.

    Args:
        bias: [N] or None.
        into: [M, N], row-major: what the product is added to, in place.
        plus: a low-rank term; of many ranks it is added by a pass of its own.
    """
    library = native.over_bf16("bf16_product") if x.is_cpu else None
    if library is None or not x.dtype == weight.dtype == torch.bfloat16:
        return None
    (m, k), n, by_output = x.shape, weight.shape[0], weight.is_contiguous()
    if m < FEWEST_ROWS or not n or not k or k % 2 or not (by_output or weight.t().is_contiguous()):
        return None
    if into is not None and not into.is_contiguous():
        return None
    x, y = x.contiguous(), x.new_empty(m, n) if into is None else into
    bias = None if bias is None else bias.float().contiguous()
    fused = fitting(plus)
    term = Expanded.of(fused, x.dtype)
    library.artemis_bf16_product(
        x.data_ptr(), weight.data_ptr(), address(bias), *term.arguments, y.data_ptr(), m, k, n,
        by_output, into is not None, torch.get_num_threads(),
    )  # fmt: skip
    return y if plus is fused else LowRank.added_to(y, plus)
