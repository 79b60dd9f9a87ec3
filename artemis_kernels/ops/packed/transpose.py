"""The 8-bit numbers of a weight turned round: [N, K] to [K, N], bit for bit.

| name | shape  | dtype        | strides    |
| data | [N, K] | int8 or e4m3 | contiguous |
| out  | [K, N] | the same     | contiguous |

Bytes: 2·N·K, every line of memory once either way. A tile is read along K and written along N, 16
bytes a thread and access where 16 divides both; in between it is turned in shared memory. (torch's
copy of a transposed view moves a byte a thread and access.)
"""

import torch
import triton
import triton.language as tl

from ...core.tiling import Config, cdiv


@triton.jit
def _transpose(
    data_ptr, out_ptr,
    N, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # One grid dimension: the second may not have more than 65,535 programs.
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid_n, pid_k = tl.program_id(0) // tiles_k, tl.program_id(0) % tiles_k
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n, mask_k = offs_n < N, offs_k < K

    mask = mask_n[:, None] & mask_k[None, :]
    tile = tl.load(data_ptr + offs_n[:, None] * K + offs_k[None, :], mask=mask, other=0)
    mask = mask_k[:, None] & mask_n[None, :]
    tl.store(out_ptr + offs_k[:, None] * N + offs_n[None, :], tl.trans(tile), mask=mask)


def transpose(data: torch.Tensor, *, config: Config) -> torch.Tensor:
    """Return `data`ᵀ [K, N], contiguous, in the dtype of `data` [N, K]."""
    N, K = data.shape
    out = data.new_empty(K, N)
    _transpose[(cdiv(N, config.block_n) * cdiv(K, config.block_k),)](
        data.contiguous().view(torch.int8), out.view(torch.int8),
        N, K,
        config.block_n, config.block_k,
        num_warps=config.warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return out
