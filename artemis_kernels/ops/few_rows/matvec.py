"""`y = (x Wᵀ)·column + s·(S Bᵀ + bias_low) + bias` for one to four rows, in one launch.

| name           | shape  | dtype              | strides                 |
| x, w           |        |                    | as in sums.py           |
| column         | [N]    | fp32, of int8, fp8 | contiguous              |
| s              | [M, R] | any float          | rows in a wider matrix  |
| b              | [N, R] | any float          | any                     |
| bias, bias_low | [N]    | any float          | contiguous              |
| y              | [M, N] | x's                | contiguous              |

Everything is fp32 until the store. 2·M·N·(K + R) FLOPs on the plain units: tensor cores would
multiply 16 rows, most of them padding. Bytes: W and B once, x and S from the cache. A program has
few rows of W, so that every processor has several programs, one of which waits for its loads while
another adds; K is not cut, so that nothing is left to be summed by another launch.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ...core.quantized import QuantizedWeight
from ...core.strategies import TENSOR
from ...core.tiles import effective_scale
from ...core.tiling import Config, cdiv, next_power_of_2
from ..packed.epilogue import Epilogue
from .sums import row_sums


@triton.jit(do_not_specialize=["M"])
def _matvec(
    x_ptr, w_ptr, group_scale_ptr, group_offset_ptr, column_ptr, s_ptr, b_ptr, bias_ptr,
    bias_low_ptr, y_ptr, scale_ptr,
    M, N, R, columns,
    stride_xm, stride_xk, stride_wn, stride_sm, stride_bn, stride_br,
    scale,
    FORMAT: tl.constexpr, HALF: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_m = tl.arange(0, BLOCK_M)
    # Rows past the last one read it again: W needs no mask along them.
    rows_n = tl.minimum(offs_n, N - 1).to(tl.int64)

    if s_ptr is not None:  # on its way while W is read
        offs_r = tl.arange(0, BLOCK_R)
        mask_r = (offs_r < R)[None, :]
        s_ptrs = s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :]
        s = tl.load(s_ptrs, mask=mask_r & (offs_m < M)[:, None], other=0.0)
        b_ptrs = b_ptr + rows_n[:, None] * stride_bn + offs_r[None, :] * stride_br
        b = tl.load(b_ptrs, mask=mask_r, other=0.0)

    acc = row_sums(
        x_ptr, w_ptr, group_scale_ptr, group_offset_ptr, rows_n, M, columns, stride_xm, stride_xk,
        stride_wn, FORMAT, HALF, EVEN, STAGES, BLOCK_M, BLOCK_N, BLOCK_B,
    )  # fmt: skip

    if column_ptr is not None:
        column = tl.load(column_ptr + rows_n)
        acc *= (column * 256.0 if FORMAT == "fp8" else column)[None, :]
    if s_ptr is not None:
        low = tl.sum(s.to(tl.float32)[:, None, :] * b.to(tl.float32)[None], 2)
        if bias_low_ptr is not None:
            low += tl.load(bias_low_ptr + rows_n).to(tl.float32)[None, :]
        acc += low * effective_scale(scale, scale_ptr)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows_n).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
    mask = (offs_m < M)[:, None] & mask_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def matvec(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    epilogue: Epilogue,
    *,
    config: Config,
) -> torch.Tensor:
    """Return y [M, N] in x's dtype; of the epilogue its low-rank term and its biases."""
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    return prepared(weight, epilogue, x.shape[0], config)(x, epilogue.s)


def prepared(
    weight: torch.Tensor | QuantizedWeight, epilogue: Epilogue, rows: int, config: Config
) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """`matvec` of any x and s of so many rows: what does not depend on them is made once."""
    N, b, bias, bias_low = weight.shape[0], epilogue.b, epilogue.bias, epilogue.bias_low
    R = 0 if b is None else b.shape[1]
    grid = (cdiv(N, config.block_n),)
    fixed = {
        "b_ptr": b, "scale": epilogue.scale.number, "scale_ptr": epilogue.scale.tensor,
        "bias_ptr": None if bias is None else bias.contiguous(),
        "bias_low_ptr": None if bias_low is None else bias_low.contiguous(),
        "M": rows, "N": N, "R": R, "stride_bn": 0 if b is None else b.stride(0),
        "stride_br": 0 if b is None else b.stride(1), "BLOCK_M": next_power_of_2(rows),
        "BLOCK_N": config.block_n, "BLOCK_R": next_power_of_2(max(1, R)), "STAGES": config.stages,
        "num_warps": config.warps, "enable_fp_fusion": True,
        **weight_arguments(weight, config.block_k),
    }  # fmt: skip

    def launch(x: torch.Tensor, s: torch.Tensor | None) -> torch.Tensor:
        y = x.new_empty(rows, N)
        _matvec[grid](
            x_ptr=x, s_ptr=s, y_ptr=y, stride_xm=x.stride(0), stride_xk=x.stride(1),
            stride_sm=0 if s is None else s.stride(0), **fixed,
        )  # fmt: skip
        return y

    return launch


def weight_arguments(weight: torch.Tensor | QuantizedWeight, block_k: int) -> dict:
    """The arguments of a launch that `row_sums` reads of a weight."""
    if isinstance(weight, torch.Tensor):
        return {
            "w_ptr": weight, "stride_wn": weight.stride(0), "columns": weight.shape[1],
            "group_scale_ptr": None, "group_offset_ptr": None, "column_ptr": None,
            "FORMAT": TENSOR, "HALF": 1, "EVEN": weight.shape[1] % block_k == 0, "BLOCK_B": block_k,
        }  # fmt: skip
    data, scale = weight.data.contiguous(), weight.scale.contiguous()
    columns, in_groups = data.shape[1], weight.format == "int4"
    block = block_k // 2 if in_groups else block_k
    return {
        "w_ptr": data.view(torch.uint8 if in_groups else torch.int8), "stride_wn": columns,
        "columns": columns, "group_scale_ptr": scale if in_groups else None,
        "group_offset_ptr": weight.offset.contiguous() if in_groups else None,
        "column_ptr": None if in_groups else scale, "FORMAT": weight.format,
        "HALF": weight.group_size // 2 if in_groups else 1, "EVEN": columns % block == 0,
        "BLOCK_B": block,
    }  # fmt: skip
