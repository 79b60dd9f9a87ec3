"""`y = x Wᵀ + bias + s·(S Bᵀ + bias_low)` by tensor descriptors: `expand` for Hopper and later.

As many programs as the chip has processors walk over the tiles of y. Tiles of x and W arrive by
TMA, which computes addresses and bounds in hardware and fills with zeros past an edge; the
low-rank term, far smaller, is loaded through pointers. Descriptors are made on the host, once a
launch: those made inside a pipelined loop fail on Triton 3.6.

| name           | shape  | dtype                  | layout                                        |
| x              | [M, K] | fp16, bf16, fp32       | rows of stride 1, other stride and address at |
| weight         | [N, K] | x's                    | whole 16 bytes (`has_descriptors`)            |
| s              | [M, R] | any float, cast to x's | rows in a wider matrix                        |
| b              | [N, R] | any float, cast to x's | any                                           |
| bias, bias_low | [N]    | any float              | contiguous                                    |
| y              | [M, N] | x's                    | contiguous, N·itemsize a multiple of 16       |

A weight that is the transpose of such a matrix is described as it lies: dX = dY W. FLOPs, bytes and
rounding are those of `expand`.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...core.tiles import grouped_tile
from ...core.tiling import Config, cdiv
from .arguments import NO_DROPOUT, UNSCALED, Dropout, Scale, contiguous
from .low_rank_tile import add_biases, low_rank_tile

_ALIGNMENT = 16  # bytes, of an address and of every stride but the last: CUDA, cuTensorMapEncode


@triton.jit(do_not_specialize=["M", "threshold"])
def _expand_persistent(
    x_desc, w_desc, y_desc, s_ptr, b_ptr, bias_ptr, bias_low_ptr, seed_ptr, scale_ptr,
    M, N, K, R, programs,
    stride_sm, stride_bn, stride_br,
    scale, threshold, rescale,
    PAIRED: tl.constexpr, TRANSPOSED: tl.constexpr, RANK_BLOCKS: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs):
        pid_m, pid_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
        offs_m = start_m.to(tl.int64) + tl.arange(0, BLOCK_M)
        offs_n = start_n + tl.arange(0, BLOCK_N).to(tl.int64)

        acc = low_rank_tile(
            s_ptr, b_ptr, seed_ptr, scale_ptr, offs_m, start_n, M, N, R, stride_sm, stride_bn,
            stride_br, scale, threshold, rescale, x_desc.dtype,
            PAIRED, RANK_BLOCKS, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([start_m, k])
            w = w_desc.load([k, start_n]) if TRANSPOSED else w_desc.load([start_n, k]).T
            acc = tl.dot(x, w, acc, input_precision="ieee")

        acc = add_biases(acc, bias_ptr, bias_low_ptr, scale_ptr, scale, offs_n, offs_n < N)
        y_desc.store([start_m, start_n], acc.to(y_desc.dtype))


def has_descriptors(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether TMA can address x, the weight (or its transpose) and y [M, N]."""
    rows = weight if weight.stride(1) == 1 else weight.t()
    return _described(x) and _described(rows) and weight.shape[0] * x.itemsize % _ALIGNMENT == 0


def _described(x: torch.Tensor) -> bool:
    return (
        x.stride(1) == 1
        and x.stride(0) >= x.shape[1]
        and x.stride(0) * x.itemsize % _ALIGNMENT == 0
        and x.data_ptr() % _ALIGNMENT == 0
    )


def expand_persistent(
    x: torch.Tensor,
    weight: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    *,
    config: Config,
    programs: int,
    bias: torch.Tensor | None = None,
    bias_low: torch.Tensor | None = None,
    scale: Scale = UNSCALED,
    dropout: Dropout = NO_DROPOUT,
) -> torch.Tensor:
    """Return y [M, N] in x's dtype by at most `programs` programs; needs `has_descriptors`."""
    (M, K), (N, R) = x.shape, b.shape
    y = x.new_empty(M, N)
    if M == 0:
        return y
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    programs = min(programs, cdiv(M, block_m) * cdiv(N, block_n))
    transposed = weight.stride(1) != 1
    described = (weight.t(), [block_k, block_n]) if transposed else (weight, [block_n, block_k])
    seed, threshold, rescale, paired = dropout.arguments(M, N)
    _expand_persistent[(programs,)](
        TensorDescriptor.from_tensor(x, [block_m, block_k]),
        TensorDescriptor.from_tensor(*described),
        TensorDescriptor.from_tensor(y, [block_m, block_n]),
        s, b, contiguous(bias), contiguous(bias_low), seed, scale.tensor,
        M, N, K, R, programs,
        s.stride(0), *b.stride(),
        scale.number, threshold, rescale,
        paired, transposed, cdiv(R, config.block_r), 8,
        block_m, block_n, block_k, config.block_r,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return y
