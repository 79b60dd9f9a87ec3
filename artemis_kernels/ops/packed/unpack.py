"""A packed weight as a dense matrix, where a copy costs less than reading packed tiles.

| name          | shape           | dtype                   | strides    |
| w             | [N, K or K/2]   | bytes (codes.py)        | contiguous |
| scale, offset | [N] or [N, K/g] | fp32, or bf16 of groups | contiguous |
| out           | [N, K]          | fp16, bf16, fp32        | contiguous |

`code · scale + offset` in fp32, rounded once. Bytes: the packed weight read, the dense one written.
"""

import torch
import triton
import triton.language as tl

from ...core.quantized import QuantizedWeight
from ...core.tiling import Config, cdiv
from .codes import group_values, low_columns, numbers, pair_of_weights
from .weight_only import bytes_a_step


@triton.jit
def _unpack(
    w_ptr, scale_ptr, offset_ptr, out_ptr,
    N, K, columns,
    FORMAT: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(1) * BLOCK_B
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_b = start + tl.arange(0, BLOCK_B)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_b < columns)[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty

    codes = tl.load(w_ptr + offs_n[:, None] * columns + offs_b[None, :], mask=mask, other=0)
    if FORMAT == "int4":
        scale = group_values(scale_ptr, offs_n, start, mask_n, columns, HALF, BLOCK_B)
        offset = group_values(offset_ptr, offs_n, start, mask_n, columns, HALF, BLOCK_B)
        low, high = pair_of_weights(codes, scale, offset, dtype)
        out_ptrs = out_ptr + offs_n[:, None] * K + low_columns(offs_b, HALF)[None, :]
        tl.store(out_ptrs, low, mask=mask)
        tl.store(out_ptrs + HALF, high, mask=mask)
    else:
        scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)
        weights = numbers(codes, FORMAT, tl.float32) * scale[:, None]
        tl.store(out_ptr + offs_n[:, None] * K + offs_b[None, :], weights.to(dtype), mask=mask)


def unpack(weight: QuantizedWeight, dtype: torch.dtype, *, config: Config) -> torch.Tensor:
    """Return the weight [N, K] in `dtype`."""
    N, K = weight.shape
    data, in_groups = weight.data.contiguous(), weight.format == "int4"
    half = weight.group_size // 2 if in_groups else 1
    block = bytes_a_step(config.block_k, half)
    out = weight.scale.new_empty(N, K, dtype=dtype)
    _unpack[(cdiv(N, config.block_n), cdiv(data.shape[1], block))](
        data.view(torch.int8 if weight.format == "int8" else torch.uint8),
        weight.scale.contiguous(), weight.offset.contiguous() if in_groups else None, out,
        N, K, data.shape[1],
        weight.format, half, config.block_n, block,
        num_warps=config.warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return out
